// Whether a request can be served at all, before anything is done for it. Pure; any thread.
#pragma once

#include "protocol/base/result.h"
#include "worker/serve/request.h"

namespace tandem::worker::serve {

struct RequestLimits {
  std::int64_t vocab = 0;
  std::int64_t context_max = 0;
  std::int64_t kv_tokens = 0;  ///< that all KV blocks together hold
  bool has_text = true;        ///< a tokenizer is there
  bool has_adapters = true;
};

/// New tokens that there is space for after a prompt of so many; none: 0 or less.
std::int64_t room_after(std::int64_t prompt_tokens, const RequestLimits& limits);

/// New tokens the request may get, with max_tokens absent resolved. invalid_error and refused_error
/// as ServeEngine::submit documents them.
Result<std::int64_t> check_request(const GenerateRequest& request, const RequestLimits& limits);

}  // namespace tandem::worker::serve
