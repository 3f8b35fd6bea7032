#include "tools/cli/output.h"

#include "protocol/base/clock.h"
#include "protocol/base/str.h"
#include "protocol/base/units.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <string_view>

namespace tandem::tools {
namespace {

constexpr std::int64_t kPlainEveryMs = 2000;

/// Columns a terminal needs for UTF-8 text: code points, near enough for names and numbers.
std::size_t columns(const std::string& text) {
  return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xc0) != 0x80;
  }));
}

bool is_number(const std::string& text) {
  return !text.empty() && text.find_first_not_of("0123456789.-+") == std::string::npos;
}

/// Fields of records that are Unix milliseconds; 0: not yet.
bool is_time(const std::string& name) {
  return name == "created" || name == "started" || name == "ended" || name == "time";
}

/// Its times as people read them, in this machine's zone; those of records in lists too.
Json with_local_times(Json object) {
  for (auto& [name, value] : object.items()) {
    if (value.is_array()) {
      for (Json& item : value)
        if (item.is_object()) item = with_local_times(std::move(item));
    } else if (is_time(name) && value.is_number_integer()) {
      value = local_time(value.get<std::int64_t>());
    }
  }
  return object;
}

std::size_t terminal_columns() {
  winsize size{};
  if (::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 20) return size.ws_col;
  return 80;
}

}  // namespace

std::string Table::to_string() const {
  std::vector<std::size_t> widths;
  for (const auto& cell : header_) widths.push_back(columns(cell));
  for (const auto& row : rows_)
    for (std::size_t i = 0; i < row.size() && i < widths.size(); ++i)
      widths[i] = std::max(widths[i], columns(row[i]));
  std::string text;
  auto line = [&](const std::vector<std::string>& row) {
    for (std::size_t i = 0; i < row.size() && i < widths.size(); ++i) {
      const std::string pad(widths[i] - columns(row[i]), ' ');
      const bool last = i + 1 == row.size();
      text += is_number(row[i]) && !last ? pad + row[i] : row[i] + (last ? "" : pad);
      text += last ? "\n" : "  ";
    }
  };
  line(header_);
  for (const auto& row : rows_) line(row);
  return text;
}

std::string field(const Json& object, const std::string& name) {
  if (!object.is_object() || !object.contains(name) || object[name].is_null()) return "-";
  const Json& value = object[name];
  if (value.is_string()) return value.get<std::string>().empty() ? "-" : value.get<std::string>();
  if (value.is_number_float()) {
    char text[32];
    const double number = value.get<double>();
    const bool large = std::abs(number) >= 1000 && std::abs(number) < 1e15;
    std::snprintf(text, sizeof text, large ? "%.0f" : "%.4g", number);
    return text;
  }
  if (!value.is_structured()) return value.dump();
  if (value.empty()) return "-";
  std::string list;
  for (const auto& [key, item] : value.items()) {
    if (item.is_structured()) return value.dump();
    list += (list.empty() ? "" : ", ") + (value.is_object() ? key + " " : "") +
            (item.is_string() ? item.get<std::string>() : item.dump());
  }
  return list;
}

std::string bytes_field(const Json& object, const std::string& name) {
  if (!object.contains(name) || !object[name].is_number()) return "-";
  return format_bytes(object[name].get<std::int64_t>());
}

std::string age_field(const Json& object, const std::string& name) {
  if (!object.contains(name) || !object[name].is_number() || object[name].get<std::int64_t>() <= 0)
    return "-";
  const double seconds =
      static_cast<double>(SystemClock().unix_ms() - object[name].get<std::int64_t>()) / 1000;
  if (seconds > 48 * 3600) return str(static_cast<std::int64_t>(seconds / 86400), " d ago");
  return format_duration_s(std::max(0.0, seconds)) + " ago";
}

std::string digest_field(const Json& object, const std::string& name) {
  return field(object, name).substr(0, 12);
}

std::string local_time(std::int64_t unix_ms) {
  const auto seconds = static_cast<std::time_t>(unix_ms / 1000);
  std::tm parts{};
  char text[32];
  if (unix_ms <= 0 || ::localtime_r(&seconds, &parts) == nullptr ||
      std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S %z", &parts) == 0)
    return "";
  return text;
}

std::string describe(const Json& object) {
  const Json shown = with_local_times(object);
  std::size_t width = 0;
  for (const auto& [name, value] : shown.items()) width = std::max(width, name.size());
  std::string text;
  for (const auto& [name, value] : shown.items())
    text += name + ":" + std::string(width - name.size() + 2, ' ') + field(shown, name) + "\n";
  return text;
}

bool colors(int fd) {
  const char* no_color = std::getenv("NO_COLOR");
  const char* term = std::getenv("TERM");
  return ::isatty(fd) != 0 && (no_color == nullptr || *no_color == '\0') &&
         (term == nullptr || std::string_view(term) != "dumb");
}

ProgressBar::ProgressBar() : terminal_(::isatty(STDERR_FILENO) != 0) {}
ProgressBar::~ProgressBar() {
  finish();
}

void ProgressBar::update(std::int64_t done, std::int64_t total, const std::string& text) {
  const std::int64_t now = steady_ns() / 1'000'000;
  const bool complete = total > 0 && done >= total;
  if (!terminal_) {
    if (!complete && printed_ms_ >= 0 && now - printed_ms_ < kPlainEveryMs) return;
    printed_ms_ = now;
    std::fprintf(stderr, "%lld/%lld  %s\n", static_cast<long long>(done),
                 static_cast<long long>(total), text.c_str());
    return;
  }
  constexpr int kBarWidth = 24;
  const double share =
      total > 0 ? std::clamp(static_cast<double>(done) / static_cast<double>(total), 0.0, 1.0) : 0;
  const int filled = static_cast<int>(std::lround(share * kBarWidth));
  std::string bar;
  for (int i = 0; i < kBarWidth; ++i) bar += i < filled ? "█" : "░";
  std::string line =
      str(bar, " ", static_cast<int>(share * 100), "%  ", done, "/", total, "  ", text);
  while (columns(line) >= terminal_columns()) line.pop_back();
  std::fprintf(stderr, "\r\033[K%s", line.c_str());
  std::fflush(stderr);
  drawn_ = true;
}

void ProgressBar::finish() {
  if (drawn_) std::fprintf(stderr, "\n");
  drawn_ = false;
}

std::string sparkline(const std::vector<double>& values, std::size_t width) {
  static const char* kBars[] = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  if (values.empty()) return "";
  const std::size_t count = std::min(width, values.size());
  std::vector<double> points;
  for (std::size_t i = 0; i < count; ++i) {  // means of equal parts
    const std::size_t begin = i * values.size() / count,
                      end = std::max(begin + 1, (i + 1) * values.size() / count);
    double sum = 0;
    for (std::size_t j = begin; j < end; ++j) sum += values[j];
    points.push_back(sum / static_cast<double>(end - begin));
  }
  const auto [low, high] = std::minmax_element(points.begin(), points.end());
  std::string text;
  for (double point : points) {
    const double share = *high > *low ? (point - *low) / (*high - *low) : 0.5;
    text += kBars[std::clamp(static_cast<int>(share * 7.999), 0, 7)];
  }
  return text;
}

}  // namespace tandem::tools
