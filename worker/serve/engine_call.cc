#include "worker/serve/engine_call.h"

#include "protocol/base/check.h"

#include <cstring>
#include <type_traits>

namespace tandem::worker::serve {
namespace {

template <class T>
concept Plain = std::is_arithmetic_v<T> || std::is_enum_v<T>;

class Writer {
 public:
  explicit Writer(std::vector<std::byte>& to) : to_(to) {}
  void raw(const void* data, std::size_t bytes) {
    const auto* from = static_cast<const std::byte*>(data);
    to_.insert(to_.end(), from, from + bytes);
  }

 private:
  std::vector<std::byte>& to_;
};
class Reader {
 public:
  explicit Reader(std::span<const std::byte>& from) : from_(from) {}
  void raw(void* data, std::size_t bytes) {
    TANDEM_CHECK(bytes <= from_.size(), "a call ends after ", from_.size(), " of ", bytes, " B");
    if (bytes > 0) std::memcpy(data, from_.data(), bytes);
    from_ = from_.subspan(bytes);
  }

 private:
  std::span<const std::byte>& from_;
};

// One description of every type for both directions: `x` is read from or written to `archive`.
template <class A, Plain T>
void visit(A& archive, T& x) {
  archive.raw(&x, sizeof x);
}
template <class A>
std::size_t visit_size(A& archive, std::size_t size) {
  visit(archive, size);
  return size;
}
template <class A>
void visit(A& archive, std::string& x) {
  x.resize(visit_size(archive, x.size()));
  archive.raw(x.data(), x.size());
}
template <class A>
void visit(A& archive, Digest& x) {
  archive.raw(x.bytes.data(), x.bytes.size());
}
template <class A, class Tag>
void visit(A& archive, Id<Tag>& x) {
  visit(archive, x.value);
}
template <class A, class T>
void visit(A& archive, std::optional<T>& x) {
  bool has = x.has_value();
  visit(archive, has);
  if (!has) return x.reset();
  if (!x) x.emplace();
  visit(archive, *x);
}
template <class A, class T>
void visit(A& archive, std::vector<T>& x) {
  x.resize(visit_size(archive, x.size()));
  if constexpr (Plain<T>) {
    archive.raw(x.data(), x.size() * sizeof(T));
  } else {
    for (T& element : x) visit(archive, element);
  }
}
template <class A>
void visit(A& archive, Status& x) {
  StatusCode code = x.code();
  std::string message = x.message();
  visit(archive, code);
  visit(archive, message);
  x = Status(code, std::move(message));
}
template <class A, class... T>
void visit_all(A& archive, T&... x) {
  (visit(archive, x), ...);
}
template <class A>
void visit(A& archive, SamplingParams& x) {
  visit_all(archive, x.max_tokens, x.min_tokens, x.temperature, x.top_k, x.top_p, x.min_p,
            x.repetition_penalty, x.presence_penalty, x.frequency_penalty, x.seed, x.stop,
            x.stop_token_ids, x.include_stop, x.ignore_eos, x.skip_special_tokens, x.logprobs,
            x.prompt_logprobs_from);
}
template <class A>
void visit(A& archive, GenerateRequest& x) {
  visit_all(archive, x.id, x.adapter, x.prompt, x.sampling, x.start_index, x.priority);
}
template <class A>
void visit(A& archive, model::HostAdapterTensor& x) {
  visit_all(archive, x.layer, x.site, x.rank, x.scale, x.a, x.b);
}
template <class A>
void visit(A& archive, EngineCall& x) {
  visit_all(archive, x.kind, x.now, x.request, x.id, x.adapter, x.status, x.number, x.tensors);
}

}  // namespace

void encode(const EngineCall& call, std::vector<std::byte>& to) {
  Writer writer(to);
  visit(writer, const_cast<EngineCall&>(call));  // a writer changes nothing
}

EngineCall decode(std::span<const std::byte>& from) {
  EngineCall call;
  Reader reader(from);
  visit(reader, call);
  return call;
}

}  // namespace tandem::worker::serve
