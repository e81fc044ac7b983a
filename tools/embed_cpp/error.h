// What a program says on its one line of standard error, and the exit code it ends with.
#ifndef ZQFP_EMBED_ERROR_H
#define ZQFP_EMBED_ERROR_H

#include <stdexcept>
#include <string>

namespace zqfp {

// As zqfp-compile's: 2 usage, 3 a model that cannot be used, 6 an environment that lacks something.
enum class Exit { kUsage = 2, kModel = 3, kEnvironment = 6 };

class Error : public std::runtime_error {
 public:
  Error(Exit code, const std::string& text) : std::runtime_error(text), code_(code) {}
  Exit code() const { return code_; }

 private:
  Exit code_;
};

}  // namespace zqfp

#endif
