#include "json.h"

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace zqfp {
namespace {

constexpr size_t kDeepest = 64;

class Reader {
 public:
  explicit Reader(const std::string& document) : text_(document) {}

  std::map<std::vector<std::string>, std::string> Read() {
    if (Peek() != '{') Fail();
    Value(true);
    if (Peek() != '\0') Fail();
    return std::move(found_);
  }

 private:
  [[noreturn]] void Fail() const { throw std::runtime_error("no JSON at byte " + std::to_string(at_)); }

  // The next character that is no space; NUL at the end.
  char Peek() {
    while (at_ < text_.size() && std::strchr(" \t\r\n", text_[at_]) != nullptr && text_[at_] != '\0') ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }

  bool Take(char wanted) {
    if (Peek() != wanted) return false;
    ++at_;
    return true;
  }

  void Value(bool kept) {
    if (depth_ == kDeepest) Fail();
    ++depth_;
    if (Take('{')) Members(kept);
    else if (Take('[')) Items();
    else if (Peek() == '"') Keep(String(), kept);
    else Word();
    --depth_;
  }

  void Members(bool kept) {
    if (Take('}')) return;
    do {
      if (Peek() != '"') Fail();
      path_.push_back(String());
      if (!Take(':')) Fail();
      Value(kept);
      path_.pop_back();
    } while (Take(','));
    if (!Take('}')) Fail();
  }

  void Items() {
    if (Take(']')) return;
    do Value(false);
    while (Take(','));
    if (!Take(']')) Fail();
  }

  void Keep(std::string value, bool kept) {
    if (kept) found_[path_] = std::move(value);
  }

  void Word() {  // a number, true, false or null
    const size_t end = text_.find_first_not_of("+-.0123456789Eaeflnrstu", at_);
    const size_t size = (end == std::string::npos ? text_.size() : end) - at_;
    if (size == 0) Fail();
    at_ += size;
  }

  std::string String() {
    std::string value;
    for (++at_; at_ < text_.size(); ++at_) {
      const char c = text_[at_];
      if (c == '"') {
        ++at_;
        return value;
      }
      if (c == '\\') Escape(value);
      else value += c;
    }
    Fail();
  }

  void Escape(std::string& value) {
    static const char* const kNames = "\"\\/bfnrt";
    static const char* const kMeant = "\"\\/\b\f\n\r\t";
    if (++at_ == text_.size()) Fail();
    const char c = text_[at_];
    if (c == 'u') {
      Unicode(value);
    } else if (const char* name = c == '\0' ? nullptr : std::strchr(kNames, c)) {
      value += kMeant[name - kNames];
    } else {
      Fail();
    }
  }

  // One unit of UTF-16 as UTF-8; halves of a pair stay apart, so such names equal no file's.
  void Unicode(std::string& value) {
    if (at_ + 4 >= text_.size()) Fail();
    const std::string digits = text_.substr(at_ + 1, 4);
    if (digits.find_first_not_of("0123456789abcdefABCDEF") != std::string::npos) Fail();
    const unsigned long code = std::stoul(digits, nullptr, 16);
    at_ += 4;
    if (code < 0x80) {
      value += static_cast<char>(code);
    } else if (code < 0x800) {
      value += {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
    } else {
      value += {static_cast<char>(0xe0 | code >> 12), static_cast<char>(0x80 | (code >> 6 & 63)),
                static_cast<char>(0x80 | (code & 63))};
    }
  }

  const std::string& text_;
  size_t at_ = 0, depth_ = 0;
  std::vector<std::string> path_;
  std::map<std::vector<std::string>, std::string> found_;
};

}  // namespace

std::map<std::vector<std::string>, std::string> JsonTexts(const std::string& document) {
  return Reader(document).Read();
}

}  // namespace zqfp
