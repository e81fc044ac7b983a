# The runtime hosts of libzqfp: the ONNX Runtime custom ops and the TensorRT plugin. Both need g++ only, and open
# libzqfp.so and the CUDA driver when they run. Headers are fetched once and never kept in git:
#
#   ONNX Runtime's   ORT_INCLUDE=folder of onnxruntime_cxx_api.h, else Debian's libonnxruntime-dev
#   TensorRT's       TENSORRT_INCLUDE=folder of NvInferRuntime.h, else PyPI's kernel-lens

KERNELS := build/kernels
HEADERS := build/headers
HOSTS := zqfp_compile/kernels
HOST_FLAGS := -std=c++17 -O3 -fPIC -shared -fvisibility=hidden -fvisibility-inlines-hidden -Wall -Wextra \
	-I$(HOSTS)/include -I$(HOSTS)/hosts -Wl,--no-undefined -Wl,--exclude-libs,ALL
HOST_LIBS := -static-libstdc++ -static-libgcc -ldl -pthread
CXX ?= g++

ORT_INCLUDE ?= $(HEADERS)/onnxruntime
TENSORRT_INCLUDE ?= $(HEADERS)/tensorrt
KERNEL_LENS := kernel-lens==2.0.1
ORT_PACKAGE := libonnxruntime-dev=1.21.0+dfsg-1

.PHONY: hosts onnxruntime-ops tensorrt-plugin

hosts: onnxruntime-ops tensorrt-plugin

onnxruntime-ops: $(KERNELS)/libzqfp_onnxruntime.so

tensorrt-plugin: $(KERNELS)/libzqfp_tensorrt.so

$(KERNELS)/libzqfp_onnxruntime.so: $(wildcard $(HOSTS)/onnxruntime/* $(HOSTS)/hosts/*) $(HOSTS)/include/zqfp.h \
		| $(ORT_INCLUDE)/onnxruntime_cxx_api.h
	@mkdir -p $(@D)
	$(CXX) $(HOST_FLAGS) -isystem $(ORT_INCLUDE) $(HOSTS)/onnxruntime/*.cpp $(HOSTS)/hosts/*.cpp -o $@.tmp $(HOST_LIBS)
	mv $@.tmp $@

$(KERNELS)/libzqfp_tensorrt.so: $(wildcard $(HOSTS)/tensorrt/* $(HOSTS)/hosts/*) $(HOSTS)/include/zqfp.h \
		| $(TENSORRT_INCLUDE)/NvInferRuntime.h
	@mkdir -p $(@D)
	$(CXX) $(HOST_FLAGS) -isystem $(TENSORRT_INCLUDE) -idirafter $(HOSTS)/tensorrt/cuda_types \
		$(HOSTS)/tensorrt/*.cpp $(HOSTS)/hosts/*.cpp -o $@.tmp $(HOST_LIBS)
	mv $@.tmp $@

# Debian 13 has the package; on Debian 12 it is taken from there with apt's own client and only unpacked.
$(HEADERS)/onnxruntime/onnxruntime_cxx_api.h:
	@sh $(HOSTS)/fetch_ort_headers.sh $(HEADERS) $(ORT_PACKAGE)

$(HEADERS)/tensorrt/NvInferRuntime.h:
	@mkdir -p $(HEADERS)
	@$(PYTHON) -m pip install --quiet --no-deps --target $(HEADERS)/kernel-lens $(KERNEL_LENS) || \
		{ echo "TensorRT's headers are missing: set TENSORRT_INCLUDE=FOLDER, or let pip install $(KERNEL_LENS)" >&2; exit 1; }
	@ln -sfn kernel-lens/kernel_lens/include/tensorrt $(HEADERS)/tensorrt
