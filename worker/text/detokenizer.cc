#include "worker/text/detokenizer.h"

#include "worker/text/utf8.h"

#include <algorithm>

namespace tandem::worker::text {

Result<Detokenizer> Detokenizer::create(Tokenizer tokenizer, DetokenizerOptions options) {
  if (options.stop_strings.size() > kStopStringsMax)
    return invalid_error(str(options.stop_strings.size(), " stop strings; at most ",
                             kStopStringsMax, " are allowed"));
  for (const std::string& stop : options.stop_strings) {
    if (stop.empty() || stop.size() > kStopStringBytesMax)
      return invalid_error(str("a stop string has ", stop.size(), " bytes; 1 to ",
                               kStopStringBytesMax, " are allowed"));
    if (const std::size_t bad = find_invalid_utf8(stop); bad != std::string::npos)
      return invalid_error(str("a stop string is not valid UTF-8 at byte ", bad));
  }
  return Detokenizer(std::move(tokenizer), std::move(options));
}

Detokenizer::Update Detokenizer::append(std::int32_t id) {
  if (stopped_) return {};
  if (options_.skip_special && tokenizer_.is_special(id)) return {};
  bytes_ += drop_leading_space(tokenizer_.leading_space(), first_, tokenizer_.token_bytes(id));
  return release(false);
}

Detokenizer::Update Detokenizer::finish() {
  if (stopped_) return {};
  return release(true);
}

Detokenizer::Update Detokenizer::release(bool at_end) {
  take_characters(bytes_, held_, at_end);
  Update update;
  // The match that ends first wins, of those the longest: what a reader of single characters would
  // see, however the text was cut into tokens.
  std::size_t begin = std::string::npos, end = std::string::npos;
  for (const std::string& stop : options_.stop_strings) {
    const std::size_t at = held_.find(stop);
    if (at == std::string::npos || at + stop.size() > end) continue;
    if (at + stop.size() == end && at > begin) continue;
    begin = at;
    end = at + stop.size();
    update.stop_string = stop;
  }
  if (begin != std::string::npos) {
    update.stopped = stopped_ = true;
    update.text = held_.substr(0, begin);
    if (options_.include_stop_string) update.text += update.stop_string;
    held_.clear();
    return update;
  }
  std::size_t keep = 0;
  if (!at_end) {
    for (const std::string& stop : options_.stop_strings) {
      std::size_t length = std::min(stop.size() - 1, held_.size());
      while (length > keep && !held_.ends_with(std::string_view(stop).substr(0, length))) --length;
      keep = std::max(keep, length);
    }
  }
  // Stop strings are whole characters, but their prefixes need not be.
  std::size_t cut = held_.size() - keep;
  while (cut > 0 && cut < held_.size() && (static_cast<unsigned char>(held_[cut]) & 0xC0) == 0x80)
    --cut;
  update.text = held_.substr(0, cut);
  held_.erase(0, cut);
  return update;
}

}  // namespace tandem::worker::text
