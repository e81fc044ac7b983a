// The custom ops' kernels for CUDA, registered for the CPU provider: with fake_cuda.cpp in the place of libzqfp and the
// driver, everything but the GPU's work runs without one.

#define RegisterCustomOps RegisterRealOps
#include "register.cpp"
#undef RegisterCustomOps

ZQFP_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  Ort::InitApi(base->GetApi(ORT_API_VERSION));
  return zqfp::guarded([&] {
    static Ort::CustomOpDomain domain{"zqfp"};
    zqfp::add<zqfp::LinearOp<zqfp::CudaLinear, false>>(domain);
    zqfp::add<zqfp::QuantizeOp<zqfp::CudaQuantizer, false, false>>(domain);
    zqfp::add<zqfp::QuantizeOp<zqfp::CudaQuantizer, false, true>>(domain);
    zqfp::add<zqfp::FusedOp<zqfp::CudaQuantizer, false, ZQFP_SILU_MUL>>(domain);
    zqfp::add<zqfp::FusedOp<zqfp::CudaQuantizer, false, ZQFP_RMS_NORM>>(domain);
    zqfp::add<zqfp::QuantizedLinearOp<zqfp::CudaQuantizedLinear, false>>(domain);
    Ort::UnownedSessionOptions session(options);
    session.Add(domain);
  });
}
