#include "folder.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <stdexcept>

#include "error.h"
#include "json.h"
#include "sha256.h"

namespace zqfp {
namespace {

std::ifstream Open(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Error(Exit::kModel, path + ": " + std::strerror(errno) + "; give a compiled folder, copied whole");
  return file;
}

}  // namespace

std::string ReadFile(const std::string& path) {
  std::ifstream file = Open(path);
  std::ostringstream content;
  content << file.rdbuf();
  return content.str();
}

Folder::Folder(std::string path) : path_(std::move(path)) {
  const std::string name = path_ + "/manifest.json";
  const std::string text = ReadFile(name);
  try {
    texts_ = JsonTexts(text);
  } catch (const std::runtime_error& error) {
    throw Error(Exit::kModel, name + ": " + error.what() + "; copy the folder or compile again");
  }
}

std::string Folder::Verified(const std::string& name) const {
  const std::string file = path_ + "/" + name;
  const auto listed = texts_.find({"files", name, "sha256"});
  if (listed == texts_.end()) throw Error(Exit::kModel, file + ": not in manifest.json; compile for this runtime");
  std::ifstream content = Open(file);
  if (Sha256(content) != listed->second) {
    throw Error(Exit::kModel, file + ": has changed since the compile; copy it again, or compile again");
  }
  return file;
}

std::string Folder::VersionOf(const std::string& package) const {
  for (const auto& [keys, text] : texts_) {
    if (keys.size() != 2 || keys[0] != "versions") continue;
    if (keys[1] == package || keys[1].rfind(package + "-cu", 0) == 0) return text;
  }
  return "";
}

}  // namespace zqfp
