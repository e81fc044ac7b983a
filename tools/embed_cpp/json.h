#ifndef ZQFP_EMBED_JSON_H
#define ZQFP_EMBED_JSON_H

#include <map>
#include <string>
#include <vector>

namespace zqfp {

// Every text of a JSON document by the keys that lead to it: {"files": {"a": {"sha256": "0f"}}} gives
// {"files", "a", "sha256"} -> "0f". Numbers and literals are checked and left out; what is in a list is, too.
// Throws std::runtime_error, with the place, when the document is no JSON object or is nested too deeply.
std::map<std::vector<std::string>, std::string> JsonTexts(const std::string& document);

}  // namespace zqfp

#endif
