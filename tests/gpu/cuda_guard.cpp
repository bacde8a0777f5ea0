// Lets autograd run over fake CUDA tensors in a CPU build of PyTorch: a device guard that does nothing, and hooks that
// report one GPU. tests/gpu/fake_cuda.py loads it before torch.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device;
using c10::DeviceType;
using c10::Stream;

struct OneGPU : at::CUDAHooksInterface {
  explicit OneGPU(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
};

namespace at {
using ::OneGPU;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, OneGPU)
}  // namespace at

struct NoGuard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return {DeviceType::CUDA, 0}; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, {DeviceType::CUDA, 0}); }
  Stream exchangeStream(Stream) const noexcept override { return getStream({DeviceType::CUDA, 0}); }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

C10_REGISTER_GUARD_IMPL(CUDA, NoGuard)
