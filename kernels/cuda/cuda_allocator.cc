#include "kernels/cuda/cuda_allocator.h"

#include "kernels/arena.h"
#include "kernels/cuda/cuda_check.h"
#include "protocol/base/units.h"

#include <algorithm>

namespace tandem::kernels::cuda {
namespace {

template <class F>
void find(F& function, const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult state{};
  TANDEM_CUDA(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &state));
  if (state != cudaDriverEntryPointSuccess || found == nullptr)
    throw DeviceError(str("the NVIDIA driver has no ", name, ": a newer driver is needed"));
  function = reinterpret_cast<F>(found);
}

Driver load_driver() {
  Driver d{};
  find(d.address_reserve, "cuMemAddressReserve");
  find(d.address_free, "cuMemAddressFree");
  find(d.create, "cuMemCreate");
  find(d.release, "cuMemRelease");
  find(d.map, "cuMemMap");
  find(d.unmap, "cuMemUnmap");
  find(d.set_access, "cuMemSetAccess");
  find(d.error_string, "cuGetErrorString");
  return d;
}

std::string error_text(CUresult code) {
  const char* text = nullptr;
  Driver::get().error_string(code, &text);
  return str(text != nullptr ? text : "unknown error", " (", static_cast<int>(code), ")");
}

void check(CUresult code, const char* what) {
  if (code != CUDA_SUCCESS) throw DeviceError(str("CUDA: ", what, ": ", error_text(code)));
}

CUdeviceptr address(const void* base, std::int64_t offset = 0) {
  return reinterpret_cast<CUdeviceptr>(base) + static_cast<CUdeviceptr>(offset);
}

std::int64_t piece_bytes(Sharing sharing) {
  return sharing == Sharing::kPeers ? kPeerPiece : kMapGranularity;
}

}  // namespace

const Driver& Driver::get() {
  static const Driver driver = load_driver();
  return driver;
}

CudaAllocator::CudaAllocator(int device, std::int64_t memory_bytes_max)
    : device_(device), memory_bytes_max_(memory_bytes_max) {
  (void)Driver::get();
}

CudaAllocator::~CudaAllocator() {
  while (!ranges_.empty()) release(ranges_.begin()->first, 0);
}

Result<void*> CudaAllocator::reserve(std::int64_t bytes, Sharing sharing) {
  const std::int64_t piece = piece_bytes(sharing);
  const std::int64_t whole = round_up(std::max<std::int64_t>(bytes, 1), piece);
  CUdeviceptr base = 0;
  const CUresult code = Driver::get().address_reserve(&base, static_cast<std::size_t>(whole),
                                                      static_cast<std::size_t>(piece), 0, 0);
  if (code != CUDA_SUCCESS)
    return refused_error(
        str("reserving ", format_bytes(bytes), " of GPU address space: ", error_text(code)));
  auto* pointer = reinterpret_cast<void*>(base);
  ranges_[pointer] = {whole, sharing, {}};
  return pointer;
}

Status CudaAllocator::map_piece(void* base, Range& range, std::int64_t offset) {
  const Driver& driver = Driver::get();
  CUmemAllocationProp prop{};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  prop.location.id = device_;
  if (range.sharing == Sharing::kPeers)
    prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  const auto piece = static_cast<std::size_t>(piece_bytes(range.sharing));
  CUmemGenericAllocationHandle handle = 0;
  const CUresult code = driver.create(&handle, piece, &prop, 0);
  if (code != CUDA_SUCCESS)
    return refused_error(str("out of GPU memory: ", format_bytes(mapped_total_),
                             " in use by this engine: ", error_text(code)));
  check(driver.map(address(base, offset), piece, 0, handle, 0), "cuMemMap");
  range.pieces[offset] = handle;
  mapped_total_ += piece_bytes(range.sharing);
  return {};
}

Status CudaAllocator::map(void* base, std::int64_t from, std::int64_t to) {
  const auto found = ranges_.find(base);
  TANDEM_CHECK(found != ranges_.end(), "map of unknown range ", base);
  // Of a kPeers range the piece that `from` lies in may be there already.
  Range& range = found->second;
  const std::int64_t piece = piece_bytes(range.sharing);
  from = round_up(from, piece);
  to = round_up(to, piece);
  if (from == to) return {};
  if (memory_bytes_max_ > 0 && mapped_total_ + to - from > memory_bytes_max_)
    return refused_error(str("out of GPU memory: ", format_bytes(to - from), " asked, ",
                             format_bytes(mapped_total_), " in use, limit ",
                             format_bytes(memory_bytes_max_)));
  for (std::int64_t at = from; at < to; at += piece)
    if (Status status = map_piece(base, range, at); !status.ok()) {
      while (at > from) unmap_piece(base, range, at -= piece);
      return status;
    }
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = device_;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  check(Driver::get().set_access(address(base, from), static_cast<std::size_t>(to - from), &access,
                                 1),
        "cuMemSetAccess");
  return {};
}

void CudaAllocator::unmap_piece(void* base, Range& range, std::int64_t offset) {
  const auto piece = range.pieces.find(offset);
  TANDEM_CHECK(piece != range.pieces.end(), "unmap of ", offset, ", which is not mapped");
  const std::int64_t bytes = piece_bytes(range.sharing);
  check(Driver::get().unmap(address(base, offset), static_cast<std::size_t>(bytes)), "cuMemUnmap");
  check(Driver::get().release(piece->second), "cuMemRelease");
  mapped_total_ -= bytes;
  range.pieces.erase(piece);
}

void CudaAllocator::unmap(void* base, std::int64_t from, std::int64_t to) {
  const auto found = ranges_.find(base);
  TANDEM_CHECK(found != ranges_.end(), "unmap of unknown range ", base);
  TANDEM_CUDA(cudaDeviceSynchronize());
  Range& range = found->second;
  const std::int64_t piece = piece_bytes(range.sharing);
  for (std::int64_t at = round_up(from, piece); at < round_up(to, piece); at += piece)
    unmap_piece(base, range, at);
}

void CudaAllocator::release(void* base, std::int64_t) {
  const auto range = ranges_.find(base);
  TANDEM_CHECK(range != ranges_.end(), "release of unknown range ", base);
  TANDEM_CUDA(cudaDeviceSynchronize());
  while (!range->second.pieces.empty())
    unmap_piece(base, range->second, range->second.pieces.begin()->first);
  check(Driver::get().address_free(address(base), static_cast<std::size_t>(range->second.bytes)),
        "cuMemAddressFree");
  ranges_.erase(range);
}

}  // namespace tandem::kernels::cuda
