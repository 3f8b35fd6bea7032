// The command line of the benches that `tandem bench` starts.
#pragma once

#include <CLI/CLI.hpp>

#include <optional>

namespace tandem::tools {

/// Parses it; --json, which every verb of `tandem` takes, changes nothing: a bench prints JSON. The
/// exit code where the program ends here, as `tandem`'s: 0 after --help, 2 for wrong usage.
inline std::optional<int> parse_bench(CLI::App& app, int argc, char** argv) {
  app.add_flag("--json")->description("JSON is what it prints anyway");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  return std::nullopt;
}

}  // namespace tandem::tools
