// The two types TensorRT's headers take from CUDA, for builds without a CUDA toolkit. The build looks here last: a
// toolkit's own header is used where there is one.
#ifndef ZQFP_CUDA_TYPES_H
#define ZQFP_CUDA_TYPES_H

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;

#endif
