# build/kernels/libcutlass_w4a8.so, a contender of bench_gemm.py: needs nvcc (13.0; it takes minutes), no GPU.
#   make -f tools/cutlass/contender.mk
# CUTLASS's headers come from PyPI's nvidia-cutlass, pinned, into build/headers; CUTLASS_INCLUDE=FOLDER names others.

PYTHON ?= python3
NVCC ?= nvcc
KERNELS ?= build/kernels
HEADERS ?= build/headers
CUTLASS := nvidia-cutlass==4.2.0.0
CUTLASS_INCLUDE ?= $(HEADERS)/cutlass

# Without NDEBUG, assertions in the device code serialise wgmma (C7510): an error.
FLAGS := -std=c++17 -O3 -DNDEBUG -gencode=arch=compute_90a,code=sm_90a -cudart static --expt-relaxed-constexpr \
	-Xcompiler -fPIC,-fvisibility=hidden -shared -Xlinker --exclude-libs=ALL,--no-undefined

$(KERNELS)/libcutlass_w4a8.so: tools/cutlass/w4a8.cu tools/cutlass/contender.mk | $(CUTLASS_INCLUDE)/cutlass/cutlass.h
	@mkdir -p $(@D)
	$(NVCC) $(FLAGS) -I$(CUTLASS_INCLUDE) $< -o $@.tmp > $@.log 2>&1 || { cat $@.log >&2; exit 1; }
	@if grep -E 'C75(10|12)' $@.log >&2; then rm -f $@.tmp; exit 1; fi
	mv $@.tmp $@

$(HEADERS)/cutlass/cutlass/cutlass.h:
	@mkdir -p $(HEADERS)
	@$(PYTHON) -m pip install --quiet --no-deps --target $(HEADERS)/nvidia-cutlass $(CUTLASS) || \
		{ echo "CUTLASS's headers are missing: set CUTLASS_INCLUDE=FOLDER, or let pip install $(CUTLASS)" >&2; exit 1; }
	@ln -sfn nvidia-cutlass/cutlass_library/source/include $(HEADERS)/cutlass
