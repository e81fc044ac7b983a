#include "generate.h"

#include <cmath>
#include <cstring>
#include <iostream>
#include <stdexcept>

#include "error.h"

namespace zqfp {
namespace {

const std::string kPast = "past_key_values.";
const std::string kPresent = "present.";

int64_t Number(const char* text) {
  try {
    size_t used = 0;
    const int64_t number = std::stoll(text, &used);
    if (text[used] == '\0') return number;
  } catch (const std::logic_error&) {  // no number, or out of range
  }
  throw Error(Exit::kUsage, std::string(text) + ": is not a whole number");
}

void Run(int argc, char** argv, const std::function<std::unique_ptr<Model>(const Folder&)>& open) {
  const int64_t count = Number(argv[2]), end = Number(argv[3]);
  std::vector<int64_t> tokens;
  for (int i = 4; i < argc; ++i) tokens.push_back(Number(argv[i]));
  const std::unique_ptr<Model> model = open(Folder(argv[1]));
  for (int64_t made = 0; made < count; ++made) {
    tokens = {model->Step(tokens)};
    std::cout << tokens[0] << std::endl;
    if (tokens[0] == end) break;
  }
}

float FromHalf(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                              : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  if (exponent == 31) value = fraction == 0 ? INFINITY : NAN;
  return (bits & 0x8000) != 0 ? -value : value;
}

float At(const void* logits, int64_t index, Float type) {
  float value;
  if (type == Float::kFloat32) {
    std::memcpy(&value, static_cast<const char*>(logits) + 4 * index, sizeof(value));
    return value;
  }
  uint16_t half;
  std::memcpy(&half, static_cast<const char*>(logits) + 2 * index, sizeof(half));
  if (type == Float::kFloat16) return FromHalf(half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace

int Generate(int argc, char** argv, const std::function<std::unique_ptr<Model>(const Folder&)>& open) {
  const std::string path = argv[0], program = path.substr(path.rfind('/') + 1);
  if (argc < 5) {
    std::cerr << "usage: " << program << " FOLDER MAX_NEW_TOKENS END_TOKEN TOKEN...\n";
    return static_cast<int>(Exit::kUsage);
  }
  Exit code = Exit::kModel;
  std::string line;
  try {
    Run(argc, argv, open);
    return 0;
  } catch (const Error& error) {
    line = error.what(), code = error.code();
  } catch (const std::exception& error) {  // a runtime refuses the model
    line = std::string(argv[1]) + ": " + error.what();
  }
  for (char& c : line) c = c == '\n' ? ' ' : c;
  std::cerr << program << ": error: " << line << "\n";
  return static_cast<int>(code);
}

bool IsPast(const std::string& input) { return input.rfind(kPast, 0) == 0; }

std::string PresentOf(const std::string& past) { return kPresent + past.substr(kPast.size()); }

StepInputs::StepInputs(const std::vector<int64_t>& tokens, int64_t cached)
    : ids_(tokens), mask_(static_cast<size_t>(cached) + tokens.size(), 1) {
  for (size_t i = 0; i < tokens.size(); ++i) positions_.push_back(cached + static_cast<int64_t>(i));
}

std::vector<int64_t>& StepInputs::Named(const std::string& input) {
  if (input == "input_ids") return ids_;
  if (input == "attention_mask") return mask_;
  if (input == "position_ids") return positions_;
  throw Error(Exit::kModel, "the model has an input " + input + ", which this program cannot feed");
}

std::vector<int64_t> EmptyCache(std::vector<int64_t> dims) {
  for (size_t axis = 0; axis < dims.size(); ++axis) {
    if (dims[axis] < 0) dims[axis] = axis == 0 ? 1 : 0;
  }
  return dims;
}

size_t SizeOf(Float type) { return type == Float::kFloat32 ? 4 : 2; }

int64_t Likeliest(const void* logits, int64_t size, Float type) {
  int64_t best = 0;
  for (int64_t i = 0; i < size; ++i) {
    const float value = At(logits, i, type);
    if (std::isnan(value)) throw Error(Exit::kModel, "the logits are not numbers (NaN); compile the model again");
    if (value > At(logits, best, type)) best = i;
  }
  return best;
}

}  // namespace zqfp
