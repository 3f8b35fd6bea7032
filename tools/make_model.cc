// make_model: writes a model of a well-known shape with random weights as a Hugging Face folder,
// for runs on machines without a network: make_model --shape llama3-8b FOLDER. Prints one JSON
// value.
#include "protocol/base/clock.h"
#include "tools/bench_device.h"
#include "tools/random_model.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <filesystem>
#include <iostream>

int main(int argc, char** argv) {
  using namespace tandem;
  std::string shape, folder;
  CLI::App app("Writes a model with random weights and a tokenizer of single bytes");
  app.add_option("--shape", shape)->required()->check(CLI::IsMember(tools::bench_shapes()));
  app.add_option("FOLDER", folder, "made when missing")->required();
  CLI11_PARSE(app, argc, argv);
  const std::int64_t begin = steady_ns();
  const auto write = [&]() -> Status {
    TANDEM_ASSIGN_OR_RETURN(const auto model, tools::load_bench_model("", shape));
    return tools::write_model(folder, model.config, *model.source);
  };
  const Status status = write();
  if (!status.ok()) {
    std::cerr << "make_model: " << status.to_string() << std::endl;
    return exit_code(status.code());
  }
  const double seconds = static_cast<double>(steady_ns() - begin) * 1e-9;
  const auto bytes = std::filesystem::file_size(folder + "/model.safetensors");
  std::cout << nlohmann::ordered_json{{"folder", folder},
                                      {"shape", shape},
                                      {"bytes", bytes},
                                      {"seconds", seconds}}
                   .dump(2)
            << std::endl;
  return 0;
}
