// A compiled folder, its files compared with manifest.json before anything opens them.
#ifndef ZQFP_EMBED_FOLDER_H
#define ZQFP_EMBED_FOLDER_H

#include <map>
#include <string>
#include <vector>

namespace zqfp {

// Everything in a file. Throws Error.
std::string ReadFile(const std::string& path);

class Folder {
 public:
  // Reads manifest.json. Throws Error.
  explicit Folder(std::string path);

  const std::string& path() const { return path_; }

  // Whether the compile wrote a file of this name.
  bool Has(const std::string& name) const { return texts_.count({"files", name, "sha256"}) != 0; }

  // The path of a file that is what the compile wrote, by SHA-256. Throws Error.
  std::string Verified(const std::string& name) const;

  // The version of a Python package at the compile, or of its form for a version of CUDA; empty when there was none.
  std::string VersionOf(const std::string& package) const;

 private:
  std::string path_;
  std::map<std::vector<std::string>, std::string> texts_;  // by keys, {"files", name, "sha256"}
};

}  // namespace zqfp

#endif
