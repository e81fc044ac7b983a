// Runs the kernels' own source, but for ptx.cuh and wgmma.cuh, on the CPU.
#include <algorithm>
#include <thread>

#define __launch_bounds__(...)  // CUDA's headers leave it undefined for a host compiler
#include "gemm_kernel.cuh"
#include "quantize_lorc.cuh"
#include "quantize_lorc_many.cuh"
#include "quantize_norm.cuh"
#include "quantize_stream.cuh"
#include "strip_kernel.cuh"

using namespace zqfp;

struct Problem {
  const void *x8, *xv, *u, *codes, *group_scales, *bias;
  const float *row_scales, *a;
  void* y;
  void* workspace;
  int m, n, k, rank, per_token, bfloat, gated, workers, cut;
  int order;           // of the workers: 0 the last first, 1 the first first, 2 all at once
  int outputs[kMaxOutputs];  // n of each; y has one after the other
};

namespace {

// Runs cluster number `index`; `body` is what a thread does in its block.
template <typename Body>
void run_cluster(int index, int blocks, int block_threads, int shared_bytes, Body body) {
  emulator::Cluster cluster;
  cluster.threads = blocks * block_threads;
  for (int rank = 0; rank < blocks; ++rank) {
    cluster.blocks.push_back(std::make_unique<emulator::Block>(shared_bytes));
    cluster.blocks[rank]->cluster = &cluster;
    cluster.blocks[rank]->rank = rank;
    cluster.blocks[rank]->threads = block_threads;
  }
  std::vector<std::thread> threads;
  for (int rank = 0; rank < blocks; ++rank) {
    for (int thread = 0; thread < block_threads; ++thread) {
      threads.emplace_back([=, &cluster] {
        emulator::block = cluster.blocks[rank].get();
        threadIdx.x = thread;
        blockDim.x = block_threads;
        blockIdx.x = index * blocks + rank;
        body(emulator::block->memory.data);
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
}

int divide_up(int a, int b) { return (a + b - 1) / b; }


template <class S>
void quantize_lorc(const QuantizeParams& p) {
  const int clusters = divide_up(p.m, S::kTokens) * divide_up(p.rank, S::kRanks);
  for (int cluster = 0; cluster < clusters; ++cluster) {
    run_cluster(cluster, p.share, S::kThreads, sizeof(LorcShared<S>), [&](char* memory) {
      LorcQuantizer<S>(p, *reinterpret_cast<LorcShared<S>*>(memory)).run();
    });
  }
}

template <class S>
void quantize_staged(const QuantizeParams& base, int slots) {
  const StagedParams p{base, slots};
  for (int cluster = 0; cluster < divide_up(p.m, S::kTokens); ++cluster) {
    run_cluster(cluster, p.share, S::kThreads, S::shared_bytes(slots, p.rank), [&](char* memory) {
      StagedQuantizer<S>(p, memory).run();
    });
  }
}

// `size`: 0 for the kernel for few tokens; else that for many, and of x alone the stages that it has room for.
template <class Source, LorcTask kTask>
void choose_lorc(const QuantizeParams& p, int size) {
  if (size == 0) return quantize_lorc<FewTokens<Source, kTask>>(p);
  if constexpr (Source::kLoads == 1) {
    quantize_staged<StagedShape<typename Source::T, kTask == LorcTask::kPerToken>>(p, size);
  } else {
    quantize_lorc<ManyTokens<Source, kTask>>(p);
  }
}

// `size`: threads of a token's block without LoRC; with LoRC as choose_lorc has it.
template <class Source>
void quantize(const QuantizeParams& p, int size) {
  if constexpr (sizeof(typename Source::T) == 2) {
    if (p.v != nullptr) {
      return p.scale == nullptr ? choose_lorc<Source, LorcTask::kPerToken>(p, size)
                                : choose_lorc<Source, LorcTask::kStatic>(p, size);
    }
  }
  const bool few = p.share > 0;
  const int64_t per_block = int64_t(p.share) * kStreamThreads * 8;
  const int blocks = p.scale == nullptr ? p.m : int((int64_t(p.m) * p.k + per_block - 1) / per_block);
  for (int index = 0; index < blocks; ++index) {
    if (p.scale != nullptr) {
      run_cluster(index, 1, kStreamThreads, 0, [&](char*) { quantize_static<Source>(p); });
    } else {
      run_cluster(index, few ? p.share : 1, size, sizeof(TokenShared), [&](char* memory) {
        TokenShared& shared = *reinterpret_cast<TokenShared*>(memory);
        few ? quantize_token<Source, true>(p, shared) : quantize_token<Source, false>(p, shared);
      });
    }
  }
}

// A block has `threads`; `size` as choose_lorc has it.
template <typename T>
void quantize_norm(QuantizeParams p, int threads, int size) {
  for (int token = 0; token < p.m; ++token) {
    run_cluster(token, 1, threads, sizeof(NormShared), [&](char* memory) {
      NormQuantizer<T>(p, *reinterpret_cast<NormShared*>(memory)).run();
    });
  }
  if constexpr (sizeof(T) == 2) {
    follow_norm(&p);
    if (p.v != nullptr) choose_lorc<Norm<T>, LorcTask::kNothing>(p, size);
  }
}

template <typename T>
void quantize_numbers(const QuantizeParams& p, int size, int norm_threads) {
  if (p.gamma != nullptr) return quantize_norm<T>(p, norm_threads, size);
  p.other == nullptr ? quantize<Plain<T>>(p, size) : quantize<SiluMul<T>>(p, size);
}

void fill(const Problem& problem, LinearParams* p) {
  p->codes = static_cast<const uint8_t*>(problem.codes);
  p->group_scales = static_cast<const uint8_t*>(problem.group_scales);
  p->row_scales = problem.row_scales;
  p->a = problem.a;
  p->bias = problem.bias;
  p->m = problem.m;
  p->n = problem.n;
  p->row_blocks = divide_up(problem.n, kBlockRows);
  int row = 0;
  for (int i = 0; i < kMaxOutputs; ++i) {
    const int n = problem.outputs[i];
    void* y = static_cast<uint16_t*>(problem.y) + int64_t(problem.m) * row;
    p->outputs[i] = {y, n == 0 ? p->row_blocks : row / kBlockRows, problem.gated ? n / 2 : n};
    row += n;
  }
  p->k_blocks = divide_up(problem.k, kBlockColumns);
  p->per_token = problem.per_token;
  p->bfloat = problem.bfloat;
  p->gated = problem.gated;
}

template <typename Run>
void run_workers(int workers, int order, Run run) {
  std::vector<std::thread> together;
  for (int i = 0; i < workers; ++i) {
    const int worker = order == 0 ? workers - 1 - i : i;
    order == 2 ? (void)together.emplace_back(run, worker) : run(worker);
  }
  for (std::thread& thread : together) thread.join();
}

template <class C>
void run(const Problem& problem) {
  GemmParams p{};
  fill(problem, &p);
  const int box = C::kCluster > 1 ? C::kTokens / C::kCluster : std::min(problem.m, C::kTokens);
  p.box_tokens = box;
  p.x8 = emulator::make_map(problem.x8, problem.m, problem.k, 1, box);
  p.xv = emulator::make_map(problem.xv, problem.m, problem.rank, 2, box);
  p.u = emulator::make_map(problem.u, problem.rank, problem.n, 2, kLorcStep);
  p.arrivals = static_cast<uint32_t*>(problem.workspace);
  p.partials = static_cast<float*>(problem.workspace) + 4096;
  p.lorc_steps = divide_up(problem.rank, kLorcStep);
  Schedule& s = p.schedule;
  s.row_tiles = divide_up(problem.n, kBlockRows * C::kRows * C::kCluster);
  s.token_tiles = divide_up(problem.m, C::kTokens);
  s.units = divide_up(p.k_blocks, C::kSlices);
  s.token_group = 8;
  s.workers = problem.workers;
  const bool cut = problem.cut && C::kSplit == 1;
  s.whole_tiles = cut ? 0 : s.tiles();
  s.cut_workers = cut ? std::min(s.workers, s.cut_units()) : 1;
  s.prepare();
  run_workers(s.workers, problem.order, [&](int worker) {
    run_cluster(worker, C::kGang, C::kBlockThreads, C::kSharedBytes, [&](char* raw) { run_block<C>(p, raw); });
  });
}

template <class C, class Params>
void run_strip_kernel(const Problem& problem, Params p) {
  fill(problem, &p);
  p.columns = slice_blocks(p.k_blocks);
  p.strips = divide_up(problem.n, kStripRows);
  p.blocks = std::min(problem.workers, p.strips);
  p.by_blocks = FastDivisor::of(p.blocks);
  const int bytes = C::kSharedBytes + layer_bytes(C::kTokens, p.k_blocks, p.rank);
  run_workers(p.blocks * divide_up(problem.m, C::kTokens), problem.order, [&](int worker) {
    run_cluster(worker, 1, C::kThreads, bytes, [&](char* raw) { run_strips<C>(p, raw); });
  });
}

template <class C>
void run_given_strips(const Problem& problem) {
  StripParams p{};
  p.box_tokens = std::min(problem.m, 8);
  p.x8 = emulator::make_map(problem.x8, problem.m, problem.k, 1, p.box_tokens);
  p.xv = problem.xv;
  p.u = problem.u;
  p.rank = problem.rank;
  run_strip_kernel<C>(problem, p);
}

template <class C>
void run_quantized_strips(const Problem& problem, const QuantizeInputs& inputs, int source, const float* scale,
                          const void* v) {
  QuantizedStripParams p{};
  static_cast<QuantizeInputs&>(p.from) = inputs;
  p.from.scale = scale;
  p.from.m = problem.m;
  p.from.k = problem.k;
  p.from.v = v;
  p.source = source;
  p.u = problem.u;
  p.rank = problem.rank;
  p.waits = problem.order != 0;  // both ways among the tests
  p.shares = static_cast<uint32_t*>(problem.workspace);
  p.slots = static_cast<float*>(problem.workspace) + 4096;
  run_strip_kernel<C>(problem, p);
}

}  // namespace

extern "C" int emulate(int config, const Problem* problem) {
  switch (config) {
    case 0: run<Config<8, 1, 4, 64, 1, 4>>(*problem); return 64;
    case 1: run<Config<32, 2, 2, 32, 1, 4>>(*problem); return 32;
    case 2: run<Config<64, 1, 4, 128, 1, 0>>(*problem); return 128;
    case 3: run<Config<128, 2, 1, 64, 2, 4>>(*problem); return 64;
    case 4: run<Config<256, 2, 1, 64, 2, 0>>(*problem); return 64;
    case 5: run<Config<256, 2, 1, 32, 1, 0>>(*problem); return 32;
    case 6: run<Config<128, 1, 2, 128, 1, 0>>(*problem); return 128;
    case 7: run_given_strips<StripConfig<8, 64, 2>>(*problem); return 64;
    case 8: run_given_strips<StripConfig<16, 128, 3>>(*problem); return 128;
    case 9: run_given_strips<StripConfig<8, 32, 3>>(*problem); return 32;
    case 10: run<Config<16, 1, 4, 64, 1, 4, 2>>(*problem); return 64;
    case 11: run<Config<64, 2, 2, 32, 1, 0, 2>>(*problem); return 32;
    case 12: run<Config<128, 1, 2, 128, 1, 0, 2>>(*problem); return 128;
    default: return -1;
  }
}

// A kernel of strips that quantises its tokens; source as in zqfp.h; v null: no LoRC.
extern "C" int emulate_quantized(int config, const Problem* problem, const QuantizeInputs* inputs, int source,
                                 const float* scale, const void* v) {
  switch (config) {
    case 0: run_quantized_strips<StripConfig<2, 64, 3, 3, 2>>(*problem, *inputs, source, scale, v); return 64;
    case 1: run_quantized_strips<StripConfig<2, 32, 4, 2, 2>>(*problem, *inputs, source, scale, v); return 32;
    case 2: run_quantized_strips<StripConfig<2, 128, 3, 3, 2>>(*problem, *inputs, source, scale, v); return 128;
    default: return -1;
  }
}

// The inputs of a norm's quantizer; or x, and other null or SiLU's factor. dtype as in zqfp.h; v null: no LoRC.
extern "C" void emulate_quantizer(const QuantizeInputs* inputs, int dtype, int m, int k, const float* scale, void* x8,
                                  float* a, const void* v, int rank, void* xv, int share, int size, int norm_threads) {
  const QuantizeParams p{*inputs, scale, static_cast<uint8_t*>(x8), a, v, xv, m, k, v == nullptr ? 0 : rank, share};
  dtype == 3   ? quantize_numbers<float>(p, size, norm_threads)
  : dtype == 1 ? quantize_numbers<__half>(p, size, norm_threads)
               : quantize_numbers<__nv_bfloat16>(p, size, norm_threads);
}
