// What the programs share: their command line, the inputs of a step, the choice of the next token.
//
//     PROGRAM FOLDER MAX_NEW_TOKENS END_TOKEN TOKEN...
//
// prints one token number per line as it is made, the end token included; -1 as END_TOKEN never ends early. Text to
// tokens and back is the tokenizer's work (tokenizer.json).
//
// Inputs are named as torch.onnx's export (models/) and optimum name them: input_ids, attention_mask, position_ids,
// past_key_values.N.key and .value, which come back as present.N.key and .value.
#ifndef ZQFP_EMBED_GENERATE_H
#define ZQFP_EMBED_GENERATE_H

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "folder.h"

namespace zqfp {

// A loaded model with the cache of one sequence.
class Model {
 public:
  virtual ~Model() = default;

  // Runs tokens that follow the cached ones, keeps the new cache, and returns the likeliest next token.
  virtual int64_t Step(const std::vector<int64_t>& tokens) = 0;
};

// A program's main(): `open` loads the model of a folder. Errors become one line and the exit code.
int Generate(int argc, char** argv, const std::function<std::unique_ptr<Model>(const Folder&)>& open);

bool IsPast(const std::string& input);

// The output that is the next value of a cache input.
std::string PresentOf(const std::string& past);

// The inputs of one step that are no cache, each of shape [1, size].
class StepInputs {
 public:
  StepInputs(const std::vector<int64_t>& tokens, int64_t cached);

  // Throws Error for a name it does not know.
  std::vector<int64_t>& Named(const std::string& input);

 private:
  std::vector<int64_t> ids_, mask_, positions_;
};

// The shape of a cache without tokens: dims of -1 are the batch (axis 0) and the number of cached tokens.
std::vector<int64_t> EmptyCache(std::vector<int64_t> dims);

enum class Float { kFloat32, kFloat16, kBfloat16 };

size_t SizeOf(Float type);

// The index of the largest of `size` logits. Throws Error when they are not numbers.
int64_t Likeliest(const void* logits, int64_t size, Float type);

}  // namespace zqfp

#endif
