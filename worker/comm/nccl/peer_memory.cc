#include "worker/comm/nccl/peer_memory.h"

#include "kernels/allocator.h"
#include "protocol/base/str.h"
#include "protocol/base/units.h"

#include <cuda_runtime.h>

#include <utility>

namespace tandem::worker::comm {
namespace {

constexpr auto kHandleType = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

template <class F>
bool find(F& function, const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult state{};
  if (cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &state) !=
          cudaSuccess ||
      state != cudaDriverEntryPointSuccess)
    return false;
  function = reinterpret_cast<F>(found);
  return true;
}

CUdeviceptr address(const void* at) {
  return reinterpret_cast<CUdeviceptr>(at);
}

}  // namespace

Result<PeerDriver> PeerDriver::load() {
  PeerDriver d{};
  const bool all = find(d.address_reserve, "cuMemAddressReserve") &&
                   find(d.address_free, "cuMemAddressFree") && find(d.create, "cuMemCreate") &&
                   find(d.release, "cuMemRelease") && find(d.map, "cuMemMap") &&
                   find(d.unmap, "cuMemUnmap") && find(d.set_access, "cuMemSetAccess") &&
                   find(d.retain, "cuMemRetainAllocationHandle") &&
                   find(d.export_handle, "cuMemExportToShareableHandle") &&
                   find(d.import_handle, "cuMemImportFromShareableHandle") &&
                   find(d.batch, "cuStreamBatchMemOp") && find(d.error_string, "cuGetErrorString");
  if (!all) return unavailable_error("the NVIDIA driver cannot share memory between processes");
  return d;
}

PeerMemory::PeerMemory(const PeerDriver& driver, std::vector<OwnedFd> sockets, int device, int rank,
                       int size)
    : driver_(driver), sockets_(std::move(sockets)), device_(device), rank_(rank), size_(size) {}

Result<std::unique_ptr<PeerMemory>> PeerMemory::create(std::vector<OwnedFd> sockets, int device,
                                                       int rank, int size) {
  TANDEM_ASSIGN_OR_RETURN(const PeerDriver driver, PeerDriver::load());
  std::unique_ptr<PeerMemory> memory(
      new PeerMemory(driver, std::move(sockets), device, rank, size));
  TANDEM_RETURN_IF_ERROR(memory->make_window());
  return memory;
}

PeerMemory::~PeerMemory() {
  (void)cudaDeviceSynchronize();
  for (const Mapping& mapping : mappings_) {
    for (std::int64_t at = 0; at < mapping.mapped; at += mapping.piece)
      (void)driver_.unmap(mapping.base + static_cast<CUdeviceptr>(at),
                          static_cast<std::size_t>(mapping.piece));
    (void)driver_.address_free(mapping.base, static_cast<std::size_t>(mapping.bytes));
  }
  if (window_ != 0) {
    (void)driver_.unmap(window_, kWindowBytes);
    (void)driver_.address_free(window_, kWindowBytes);
  }
  if (window_handle_ != 0) (void)driver_.release(window_handle_);
}

std::string PeerMemory::text(CUresult code, const char* what) const {
  const char* name = nullptr;
  driver_.error_string(code, &name);
  return str("CUDA: ", what, ": ", name != nullptr ? name : "unknown error");
}

Status PeerMemory::make_window() {
  const auto own = [&]() -> Result<OwnedFd> {
    CUmemAllocationProp prop{};
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    prop.location.id = device_;
    prop.requestedHandleTypes = kHandleType;
    CUmemAccessDesc access{};
    access.location = prop.location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    if (const CUresult code = driver_.create(&window_handle_, kWindowBytes, &prop, 0); code != 0)
      return unavailable_error(text(code, "cuMemCreate"));
    if (const CUresult code = driver_.address_reserve(&window_, kWindowBytes, 0, 0, 0); code != 0)
      return unavailable_error(text(code, "cuMemAddressReserve"));
    if (const CUresult code = driver_.map(window_, kWindowBytes, 0, window_handle_, 0); code != 0)
      return unavailable_error(text(code, "cuMemMap"));
    if (const CUresult code = driver_.set_access(window_, kWindowBytes, &access, 1); code != 0)
      return unavailable_error(text(code, "cuMemSetAccess"));
    char* const begin = reinterpret_cast<char*>(window_);
    if (cudaMemset(begin, 0, kFlagBytes) != cudaSuccess ||
        cudaMemset(begin + kFlagBytes, 0xff, kWindowBytes - kFlagBytes) != cudaSuccess ||
        cudaDeviceSynchronize() != cudaSuccess)
      return unavailable_error("CUDA: a window cannot be cleared");
    int fd = -1;
    if (const CUresult code = driver_.export_handle(&fd, window_handle_, kHandleType, 0); code != 0)
      return unavailable_error(text(code, "cuMemExportToShareableHandle"));
    return OwnedFd(fd);
  };
  PeerMessage mine;
  auto fd = own();
  if (fd.ok()) {
    mine.fds.push_back(std::move(*fd));
    mine.bytes = kWindowBytes;
  }
  const Status met =
      meet(std::move(mine), kWindowBytes, CU_MEM_ACCESS_FLAGS_PROT_READWRITE, windows_);
  TANDEM_RETURN_IF_ERROR(fd.status());
  TANDEM_RETURN_IF_ERROR(met);
  windows_.ranks[static_cast<std::size_t>(rank_)] = reinterpret_cast<char*>(window_);
  return {};
}

Result<char*> PeerMemory::map(const std::vector<OwnedFd>& fds, std::int64_t piece,
                              CUmemAccess_flags access) {
  mappings_.push_back({0, piece * static_cast<std::int64_t>(fds.size()), piece, 0});
  Mapping& mapping = mappings_.back();
  const auto whole = static_cast<std::size_t>(mapping.bytes),
             part = static_cast<std::size_t>(piece);
  if (const CUresult code = driver_.address_reserve(&mapping.base, whole, 0, 0, 0); code != 0) {
    mappings_.pop_back();
    return unavailable_error(text(code, "cuMemAddressReserve"));
  }
  for (const OwnedFd& fd : fds) {
    CUmemGenericAllocationHandle handle = 0;
    CUresult code = driver_.import_handle(
        &handle, reinterpret_cast<void*>(static_cast<std::intptr_t>(fd.get())), kHandleType);
    if (code != 0) return unavailable_error(text(code, "cuMemImportFromShareableHandle"));
    code = driver_.map(mapping.base + static_cast<CUdeviceptr>(mapping.mapped), part, 0, handle, 0);
    (void)driver_.release(handle);  // the mapping keeps it
    if (code != 0) return unavailable_error(text(code, "cuMemMap"));
    mapping.mapped += piece;
  }
  CUmemAccessDesc desc{};
  desc.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  desc.location.id = device_;
  desc.flags = access;
  if (const CUresult code = driver_.set_access(mapping.base, whole, &desc, 1); code != 0)
    return unavailable_error(text(code, "cuMemSetAccess"));
  return reinterpret_cast<char*>(mapping.base);
}

Status PeerMemory::meet(PeerMessage mine, std::int64_t piece, CUmemAccess_flags access,
                        Region& region) {
  TANDEM_ASSIGN_OR_RETURN(const auto all, sockets_.exchange(mine));
  region.ranks.assign(static_cast<std::size_t>(size_), nullptr);
  for (int r = 0; r < size_; ++r) {
    const PeerMessage& other = all[static_cast<std::size_t>(r)];
    if (r == rank_) continue;
    if (other.fds.empty() || other.bytes != mine.bytes)
      return unavailable_error(str("rank ", r, " of a gang shares ", format_bytes(other.bytes),
                                   " where this one shares ", format_bytes(mine.bytes)));
    TANDEM_ASSIGN_OR_RETURN(char* const base, map(other.fds, piece, access));
    region.ranks[static_cast<std::size_t>(r)] = base + other.offset;
  }
  return {};
}

Status PeerMemory::share(const void* begin, std::int64_t bytes) {
  using kernels::kPeerPiece;
  const auto at = static_cast<std::int64_t>(address(begin));
  candidate_ = {static_cast<const char*>(begin), bytes, {}};
  Status exported;
  PeerMessage mine;
  mine.offset = at % kPeerPiece;
  mine.bytes = bytes;
  for (std::int64_t piece = at - mine.offset; piece < at + bytes && exported.ok();
       piece += kPeerPiece) {
    CUmemGenericAllocationHandle handle = 0;
    CUresult code = driver_.retain(&handle, reinterpret_cast<void*>(std::max(piece, at)));
    if (code == 0) {
      int fd = -1;
      code = driver_.export_handle(&fd, handle, kHandleType, 0);
      if (code == 0) mine.fds.emplace_back(fd);
      (void)driver_.release(handle);
    }
    if (code != 0) exported = unavailable_error(text(code, "memory that others are to read"));
  }
  if (!exported.ok()) mine.fds.clear();
  const Status met = meet(std::move(mine), kPeerPiece, CU_MEM_ACCESS_FLAGS_PROT_READ, candidate_);
  TANDEM_RETURN_IF_ERROR(exported);
  TANDEM_RETURN_IF_ERROR(met);
  candidate_.ranks[static_cast<std::size_t>(rank_)] = const_cast<char*>(candidate_.mine);
  return {};
}

void PeerMemory::keep() {
  // What lay there before is gone.
  std::erase_if(regions_, [&](const Region& r) {
    return r.mine < candidate_.mine + candidate_.bytes && candidate_.mine < r.mine + r.bytes;
  });
  regions_.push_back(std::move(candidate_));
  candidate_ = {};
}

void PeerMemory::drop() {
  candidate_ = {};
}

const PeerMemory::Region* PeerMemory::find(const void* begin, std::int64_t bytes) const {
  const char* at = static_cast<const char*>(begin);
  for (const Region& region : regions_)
    if (at >= region.mine && at + bytes <= region.mine + region.bytes) return &region;
  return nullptr;
}

}  // namespace tandem::worker::comm
