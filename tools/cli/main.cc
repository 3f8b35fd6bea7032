// tandem: the command line. Declares verbs and options (CLI11 is known here only) and hands them to
// commands.h. One JSON value on standard output with --json, and exit codes by Status.
#include "protocol/job_spec.h"
#include "tools/cli/commands.h"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <charconv>
#include <functional>
#include <iostream>

namespace tandem::tools {
namespace {

/// Everything the options write to, and what the chosen verb will run.
struct Invocation {
  std::map<std::string, std::string> flags;  ///< platform settings given on the command line
  std::string config_file;
  bool json = false;
  std::function<Status(Session&)> run;

  std::string name, target, path, model, role = "client", dtype = "bf16";
  bool shared = false, offline = false, follow = false, origin = false, force = false,
       prometheus = false;
  std::int64_t max_length = 2048, to_version = 0;
  std::int64_t check_max_length = protocol::TrainSettings().max_length;
  int samples = 3, lines = 20;
  std::vector<std::string> arguments;
  std::map<std::string, std::string> layout;
  UpOptions up;
  TrainOptions train;
  GenerateOptions generate;
  ReplicaOptions replica;
};

std::string kebab(std::string name) {
  for (char& c : name)
    if (c == '_') c = '-';
  return name;
}

void add_setting(CLI::App& app, Invocation& in, const std::string& name, const std::string& help) {
  app.add_option_function<std::string>(
         "--" + kebab(name), [&in, name](const std::string& v) { in.flags[name] = v; }, help)
      ->type_name("X");
}

/// "tandem job": a verb as it is typed.
std::string typed(const CLI::App& app) {
  const CLI::App* parent = app.get_parent();
  return parent == nullptr ? app.get_name() : typed(*parent) + " " + app.get_name();
}

CLI::App* verb(CLI::App& parent, Invocation& in, const std::string& name, const std::string& help,
               std::function<Status(Session&)> run, const std::string& example = "") {
  CLI::App* sub = parent.add_subcommand(name, help);
  sub->fallthrough();
  sub->footer("Example:\n  " + (example.empty() ? typed(parent) + " " + name : example));
  sub->callback([&in, run = std::move(run)] { in.run = run; });
  return sub;
}

CLI::App* group(CLI::App& app, const std::string& name, const std::string& help) {
  CLI::App* sub = app.add_subcommand(name, help);
  sub->fallthrough();
  sub->require_subcommand(1);
  return sub;
}

void add_platform(CLI::App& app, Invocation& in) {
  CLI::App* up = verb(
      app, in, "up", "start a local platform (again is fine: fills what is missing)",
      [&in](Session& s) { return run_up(s, in.up); }, "tandem up --workers 2");
  for (const char* name :
       {"workers", "device", "threads", "dtype", "memory_bytes_max", "kv_bytes_max"})
    for (const auto& info : protocol::Settings::known())
      if (info.name == name) add_setting(*up, in, name, info.help);
  up->add_flag("--foreground", in.up.foreground, "stay until Ctrl-C, then stop the platform");
  verb(app, in, "down", "stop the local platform; jobs write a checkpoint first", run_down);
  verb(
      app, in, "status", "endpoint, folders, workers, jobs",
      [&in](Session& s) { return run_status(s, in.prometheus); }, "tandem status --prometheus")
      ->add_flag("--prometheus", in.prometheus, "as text for a Prometheus server");
  verb(app, in, "doctor", "look at this machine: programs, disk, limits, processor", run_doctor);
  CLI::App* logs = verb(app, in, "logs", "the daemons' logs",
                        [&in](Session& s) { return run_logs(s, in.lines, in.follow); });
  logs->add_option("-n,--lines", in.lines, "lines of each file [20]")->check(CLI::Range(1, 100000));
  logs->add_flag("-f,--follow", in.follow, "go on as they grow");
  CLI::App* config = group(app, "config", "settings");
  verb(*config, in, "show", "every setting's value", [&in](Session& s) {
    return run_config_show(s, in.origin);
  })->add_flag("--origin", in.origin, "and where it came from");
}

CLI::App* named(CLI::App& parent, Invocation& in, const std::string& name, const std::string& help,
                std::function<Status(Session&)> run, const std::string& more = "") {
  static const std::map<std::string, std::string> kNames{
      {"model", "smol"},       {"data", "train.jsonl"},
      {"adapter", "guide"},    {"job", "job-0123456789ab"},
      {"worker", "host/cpu0"}, {"replica", "replica-0123456789ab"},
      {"key", "alice"}};
  const auto known = kNames.find(parent.get_name());
  CLI::App* sub = verb(parent, in, name, help, std::move(run),
                       str(typed(parent), " ", name, " ", known->second, more));
  static const std::map<std::string, std::string> kMeans{
      {"job", "the job's id"},
      {"worker", "HOST/DEVICE, as worker list shows it"},
      {"replica", "the replica's id"},
      {"key", "whose"}};
  const auto means = kMeans.find(parent.get_name());
  sub->add_option("name", in.name,
                  means != kMeans.end() ? means->second : "name or digest (12 digits or more)")
      ->required();
  return sub;
}

void add_objects(CLI::App& app, Invocation& in) {
  CLI::App* model = group(app, "model", "base models");
  CLI::App* add = verb(
      *model, in, "add", "register a Hugging Face folder or a GGUF file",
      [&in](Session& s) { return run_model_add(s, in.name, in.path, in.shared); },
      "tandem model add smol ./SmolLM2-135M-Instruct.Q4_1.gguf");
  add->add_option("name", in.name, "what to call it")->required();
  add->add_option("path", in.path, "on the coordinator's host")->required();
  add->add_flag("--shared", in.shared, "every worker sees the same path");
  CLI::App* data = group(app, "data", "data sets");
  CLI::App* data_add = verb(
      *data, in, "add", "upload a JSON lines file",
      [&in](Session& s) { return run_data_add(s, in.path, in.name); },
      "tandem data add train.jsonl");
  data_add->add_option("path", in.path, "file")->required();
  data_add->add_option("--name", in.name,
                       "what to call it [the file's name, or the one it has already]");
  CLI::App* check = verb(
      *data, in, "check",
      "what training would see: counts, problems, samples with trained tokens marked",
      [&in](Session& s) {
        return run_data_check(s, in.path, in.model, in.check_max_length, in.samples);
      },
      "tandem data check train.jsonl --model smol");
  check->add_option("path", in.path, "file")->required();
  check->add_option("--model", in.model, "registered name, or a path")->required();
  check
      ->add_option("--max-length", in.check_max_length,
                   str("tokens of a row [", in.check_max_length, "], as a job's"))
      ->check(CLI::PositiveNumber);
  check->add_option("--samples", in.samples, "rows to show [3]")->check(CLI::Range(0, 16));
  CLI::App* adapter = group(app, "adapter", "adapters and their versions");
  for (const auto& [parent, what] :
       {std::pair{model, "model"}, {data, "data"}, {adapter, "adapter"}}) {
    const std::string noun = what;
    verb(*parent, in, "list", "all of them", [noun](Session& s) { return run_list(s, noun); });
    named(*parent, in, "show", "one of them",
          [&in, noun](Session& s) { return run_show(s, noun, in.name); });
    CLI::App* remove = named(*parent, in, "rm", "forget one", [&in, noun](Session& s) {
      return run_remove(s, noun, in.name, in.force);
    });
    if (parent == model) remove->add_flag("--force", in.force, "also while adapters need it");
  }
  named(
      *model, in, "export", "write a Hugging Face folder",
      [&in](Session& s) { return run_model_export(s, in.name, in.path); }, " ./smol")
      ->add_option("directory", in.path, "new or empty folder to write")
      ->required();
  named(
      *adapter, in, "export", "write a PEFT folder",
      [&in](Session& s) { return run_adapter_export(s, in.name, in.path); }, " ./guide")
      ->add_option("directory", in.path, "folder to write")
      ->required();
  CLI::App* import = named(
      *adapter, in, "import", "publish a PEFT folder",
      [&in](Session& s) { return run_adapter_import(s, in.name, in.path, in.model); },
      " ./guide --model smol");
  import->add_option("directory", in.path, "folder with adapter_config.json")->required();
  import->add_option("--model", in.model, "its base model")->required();
  CLI::App* merge = named(
      *adapter, in, "merge",
      "write base and adapter as one Hugging Face folder (W + s B A, in f32)",
      [&in](Session& s) { return run_adapter_merge(s, in.name, in.path, in.dtype); },
      " ./guide-merged");
  merge->add_option("directory", in.path, "empty folder to write")->required();
  merge->add_option("--dtype", in.dtype, "of the weights that are written [bf16]")
      ->check(CLI::IsMember({"bf16", "f16", "f32"}));
  named(
      *adapter, in, "alias", "point a name at an adapter's version",
      [&in](Session& s) { return run_adapter_alias(s, in.name, in.target); }, " guide@3")
      ->add_option("target", in.target, "adapter, adapter@version or digest")
      ->required();
  named(*adapter, in, "rollback", "back to the version before, or to a given one",
        [&in](Session& s) { return run_adapter_rollback(s, in.name, in.to_version); })
      ->add_option("--to", in.to_version, "the version to go back to [the one before]")
      ->check(CLI::Range(1u, UINT32_MAX));
}

/// A setting's default as it would be typed.
std::string default_text(const std::string& field) {
  const Json value = Json::parse(protocol::TrainSettings::default_of(field));
  std::string text;
  for (const Json& item : value.is_array() ? value : Json::array({value}))
    text += (text.empty() ? "" : ",") + (item.is_string() ? item.get<std::string>() : item.dump());
  return text;
}

void add_training_options(CLI::App& sub, Invocation& in) {
  sub.add_option("--model", in.train.model, "base model");
  sub.add_option("--data", in.train.data, "JSON lines file, or a data set's name or digest");
  sub.add_option("--eval-data", in.train.eval_data, "the same, for evaluation");
  sub.add_option("--adapter", in.train.adapter, "name to publish under (method lora)");
  sub.add_option("--name", in.train.name, "name of the new model (method full)");
  sub.add_option("--priority", in.train.priority, "-100..100, higher first [0]")
      ->check(CLI::Range(-100, 100));
  sub.add_option("-f,--file", in.train.file, "job file (YAML): the same names, side by side");
  for (const auto& field : protocol::TrainSettings::field_names())
    sub.add_option_function<std::string>(
           "--" + kebab(field) +
               (field == "max_length"              ? ",--seq-len"
                : field == "virtual_pipeline_size" ? ",--virtual-pp"
                                                   : ""),
           [&in, field](const std::string& v) { in.train.settings[field] = v; },
           "[" + default_text(field) + "]")
        ->type_name("X")
        ->group("Training settings (Hugging Face and PEFT names) [default]");
}

void add_training(CLI::App& app, Invocation& in) {
  CLI::App* train = verb(
      app, in, "train", "submit a fine-tuning job",
      [&in](Session& s) { return run_train(s, in.train); },
      "tandem train --model smol --data train.jsonl --adapter guide --follow\n"
      "  tandem train --model smol --data train.jsonl --adapter guide --dp 2 "
      "--gradient-accumulation-steps 2\n"
      "  tandem train --model smol --data train.jsonl --adapter guide --pp 2\n"
      "  tandem train --model smol --data train.jsonl --adapter guide --layout auto "
      "--gradient-accumulation-steps 4\n"
      "  tandem train --model smol --data train.jsonl --method full --name smol-guide\n\n"
      "dp x tp x pp ranks take as many workers at once, of one host where one has them; their "
      "engines go on\nserving. A layout changes how a step is computed, not what: a step is "
      "gradient_accumulation_steps\nmicro-batches, dealt to the dp ranks. zero 1, 2, 3 shards "
      "optimizer, gradients, parameters over dp.\nlayout auto takes the fastest that fits on at "
      "most "
      "ranks_max workers, by dry runs and a cost model.\n"
      "tandem estimate with the same options tells memory, layout and steps, and submits nothing.");
  add_training_options(*train, in);
  train->add_flag("--follow", in.train.follow, "show progress until it ends; Ctrl-C detaches");
  add_training_options(
      *verb(
          app, in, "estimate",
          "what a job would take: device memory, layout, steps; nothing is submitted",
          [&in](Session& s) { return run_estimate(s, in.train); },
          "tandem estimate --model smol --method lora --seq-len 2048\n"
          "  tandem estimate --model smol --data train.jsonl  (rows, tokens and steps too)\n"
          "  tandem estimate --model smol --pp 2         (every rank's bytes)\n"
          "  tandem estimate --model smol --layout auto  (layouts that this pool allows, fastest "
          "first)"),
      in);
  CLI::App* job = group(app, "job", "fine-tuning jobs");
  verb(*job, in, "list", "newest first", [](Session& s) { return run_list(s, "job"); });
  named(*job, in, "show", "one job", [&in](Session& s) { return run_show(s, "job", in.name); });
  named(*job, in, "watch", "progress until it ends",
        [&in](Session& s) { return run_job_watch(s, in.name); });
  named(*job, in, "logs", "its log", [&in](Session& s) { return run_job_logs(s, in.name); });
  named(*job, in, "rm", "forget one that has ended, with its checkpoints; what it published stays",
        [&in](Session& s) { return run_remove(s, "job", in.name, false); });
  for (const auto& [action, help] : {std::pair{"cancel", "stop it for good"},
                                     {"pause", "write a checkpoint and stop"},
                                     {"resume", "go on from the last checkpoint"}}) {
    const std::string method = action;
    CLI::App* sub = named(*job, in, action, help, [&in, method](Session& s) {
      return run_job_action(s, method, in.name, in.layout);
    });
    if (method != "resume") continue;
    sub->footer("Examples:\n  tandem job resume JOB\n  tandem job resume JOB --pp 1 --dp 2");
    for (const std::string axis : {"dp", "dp_min", "tp", "pp", "zero", "virtual_pipeline_size",
                                   "pipeline_balance", "sequence_parallel", "layout"})
      sub->add_option_function<std::string>(
             "--" + kebab(axis) + (axis == "virtual_pipeline_size" ? ",--virtual-pp" : ""),
             [&in, axis](const std::string& v) { in.layout[axis] = v; },
             axis == "layout" ? "auto: the fastest that fits now" : "over other ranks than before")
          ->type_name("X");
  }
}

/// The library's own conversion takes the nearest such integer without a word.
CLI::Validator integer_of_64_bits() {
  const auto check = [](const std::string& text) {
    std::int64_t value = 0;
    const auto read = std::from_chars(text.data(), text.data() + text.size(), value);
    return read.ec == std::errc::result_out_of_range ? text + " has more than 64 bits" : "";
  };
  return {check, ""};
}

void add_sampling(CLI::App& sub, Invocation& in) {
  auto& g = in.generate;
  sub.add_option("--model", g.model, "base, alias, alias@version, JOB@latest or digest")
      ->required();
  sub.add_option("--system", g.system, "system message");
  sub.add_option("--max-tokens", g.max_tokens,
                 "new tokens at most [the model's, else up to the context]");
  sub.add_option("--temperature", g.temperature, "0: greedy [the model's, else 1]");
  sub.add_option("--top-k", g.top_k, "0: off [the model's]");
  sub.add_option("--top-p", g.top_p, "1: off [the model's]");
  sub.add_option("--min-p", g.min_p, "0: off [the model's]");
  sub.add_option("--repetition-penalty", g.repetition_penalty, "1: off [the model's]");
  sub.add_option("--seed", g.seed, "makes sampling repeatable")->check(integer_of_64_bits());
  sub.add_option("--stop", g.stop, "stop string (may be given several times)")
      ->allow_extra_args(false);
  sub.add_option("--logprobs", g.logprobs, "of each token and its N likeliest (with --json)");
  sub.add_flag("--ignore-eos", g.ignore_eos, "go on after the end token");
  sub.add_flag("--no-cache", g.no_cache, "neither read nor fill the result cache");
}

void add_inference(CLI::App& app, Invocation& in) {
  CLI::App* generate = verb(
      app, in, "generate", "one answer", [&in](Session& s) { return run_generate(s, in.generate); },
      "tandem generate --model guide --prompt \"Who is the mayor?\" --max-tokens 64");
  add_sampling(*generate, in);
  generate->add_option("--prompt", in.generate.prompt, "text [standard input]");
  generate->add_flag("--raw", in.generate.raw, "no chat template");
  generate->add_flag("!--no-stream", in.generate.stream, "one chunk with everything");
  CLI::App* eval = verb(
      app, in, "eval", "mean loss of a data set's trained tokens, as served",
      [&in](Session& s) { return run_eval(s, in.model, in.path, in.max_length); },
      "tandem eval --model guide --data heldout.jsonl");
  eval->add_option("--model", in.model, "base, alias, alias@version or digest")->required();
  eval->add_option("--data", in.path, "JSON lines file")->required();
  eval->add_option("--max-length", in.max_length, "tokens of a row [2048]")
      ->check(CLI::PositiveNumber);
  add_sampling(
      *verb(
          app, in, "chat", "a conversation", [&in](Session& s) { return run_chat(s, in.generate); },
          "tandem chat --model guide"),
      in);
}

void add_replicas(CLI::App& app, Invocation& in) {
  CLI::App* replica = group(app, "replica", "bases served over several workers");
  CLI::App* add = verb(
      *replica, in, "add", "serve a base over tp x pp workers, and keep it up",
      [&in](Session& s) { return run_replica_add(s, in.replica); },
      "tandem replica add --model smol --pp 2 --follow\n"
      "  tandem replica add --model smol --tp 3 --count 2   (requests go to whichever is freer)");
  add->add_option("--model", in.replica.model, "base model")->required();
  add->add_option("--tp", in.replica.tp, "ranks that share each block [1]")
      ->check(CLI::Range(1, 64));
  add->add_option("--pp", in.replica.pp, "stages, each with some of the blocks [1]")
      ->check(CLI::Range(1, 64));
  add->add_option("--count", in.replica.count, "how many of them [1]")->check(CLI::Range(1, 64));
  add->add_flag("--follow", in.replica.follow, "wait until they serve; Ctrl-C detaches");
  verb(*replica, in, "list", "all of them", [](Session& s) { return run_list(s, "replica"); });
  named(*replica, in, "rm", "end it for good, after what it answers", [&in](Session& s) {
    return run_replica_rm(s, in.name);
  })->footer("Example:\n  tandem replica rm replica-0123456789ab");
}

void add_operations(CLI::App& app, Invocation& in) {
  CLI::App* worker = group(app, "worker", "workers");
  verb(*worker, in, "list", "all of them", [](Session& s) { return run_list(s, "worker"); });
  for (const auto& [action, help] :
       {std::pair{"drain", "nothing new; jobs move"},
        {"resume", "take work again"},
        {"restart", "a new agent and engine, of the programs in place now"}}) {
    const std::string method = action;
    named(*worker, in, action, help,
          [&in, method](Session& s) { return run_worker_action(s, method, in.name); });
  }
  CLI::App* cache = group(app, "cache", "the result cache");
  for (const std::string action : {"stats", "clear"})
    verb(*cache, in, action, action == "stats" ? "hits, misses, bytes" : "forget everything",
         [action](Session& s) { return run_cache(s, action); });
  CLI::App* registry = group(app, "registry", "what is on disk");
  verb(*registry, in, "check", "verify every digest and reference", [&in](Session& s) {
    return run_registry_check(s, in.offline);
  })->add_flag("--offline", in.offline, "without a coordinator; takes the lock");
  verb(*registry, in, "gc", "free what nothing refers to",
       [](Session& s) { return run_registry(s, "gc", ""); });
  CLI::App* backup = verb(
      *registry, in, "backup", "a consistent copy while running, of all or of one object",
      [&in](Session& s) {
        return in.name.empty() ? run_registry(s, "backup", in.path)
                               : run_object_backup(s, in.name, in.path);
      },
      "tandem registry backup ./guide --object guide@3");
  backup->add_option("path", in.path, "folder to make")->required();
  backup->add_option("--object", in.name,
                     "only this: a model, an adapter (name, name@version) or a digest, or a job "
                     "with its checkpoints and data");
  CLI::App* restore = verb(
      *registry, in, "restore",
      "a whole backup into an empty data folder, or one object's into the running registry",
      [&in](Session& s) { return run_restore(s, in.path, in.target); },
      "tandem registry restore ./guide --name guide");
  restore->add_option("path", in.path, "folder of the backup")->required();
  restore->add_option("--name", in.target, "of the object here [the one it had]");
  CLI::App* key = group(app, "key", "client and worker keys");
  verb(*key, in, "list", "all of them", [](Session& s) { return run_list(s, "key"); });
  named(*key, in, "create", "a key pair; the secret is shown once", [&in](Session& s) {
    return run_key(s, "create", in.name, in.role);
  })->add_option("--role", in.role, "client, worker or admin [client]");
  named(*key, in, "revoke", "refuse a key from now on",
        [&in](Session& s) { return run_key(s, "revoke", in.name, ""); });
  CLI::App* bench =
      verb(app, in, "bench", "measure: serve, train, ops, registry, collectives; prints JSON", {},
           "tandem bench serve --model smol --data train.jsonl\n"
           "  mpirun -np 2 tandem bench train --shape small --layout tp2\n"
           "  mpirun -np 2 tandem bench collectives");
  bench->add_option("name", in.name, "which; what follows is its own (--help shows it)");
  bench->fallthrough(false)->prefix_command()->set_help_flag();
  bench->callback([&in, bench] {
    in.arguments = bench->remaining();
    if (in.name.empty() && in.arguments.size() > 1 && in.arguments.front() == "--json") {
      in.json = true;  // a bench's output is JSON anyway
      in.name = in.arguments[1];
      in.arguments.erase(in.arguments.begin(), in.arguments.begin() + 2);
    }
    const std::string first = in.arguments.empty() ? "" : in.arguments.front();
    if (in.name.empty() && (first == "--help" || first == "-h")) throw CLI::CallForHelp();
    if (in.name.empty()) throw CLI::RequiredError("name");
    in.run = [&in](Session& s) { return run_bench(s, in.name, in.arguments); };
  });
}

constexpr const char* kCompletionHead = R"(_tandem() {
  local cur=${COMP_WORDS[COMP_CWORD]} words='' verb='' inner='' word i=1
  while [ $i -lt $COMP_CWORD ]; do
    word=${COMP_WORDS[$i]}
    case "$word" in
      --config|--data-dir|--coordinator|--key-file) i=$((i + 1)) ;;
      -*) ;;
      *) if [ -z "$verb" ]; then verb=$word; elif [ -z "$inner" ]; then inner=$word; fi ;;
    esac
    i=$((i + 1))
  done
  case "$verb:$inner" in
)";
constexpr const char* kCompletionTail = R"(  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
  [ ${#COMPREPLY[@]} -gt 0 ] || COMPREPLY=($(compgen -f -- "$cur"))
}
complete -F _tandem tandem
)";

std::string option_names(const CLI::App& app) {
  std::string names;
  for (const auto* option : app.get_options())
    for (const std::string& name : option->get_lnames()) names += "--" + name + " ";
  return names;
}

/// One function for bash; zsh runs it through its own emulation of bash's completion.
void print_completion(const CLI::App& app, const std::string& shell) {
  if (shell == "zsh") std::cout << "autoload -U +X bashcompinit && bashcompinit\n";
  std::cout << kCompletionHead;
  const std::string global = option_names(app);
  const auto row = [&](const std::string& at, const std::string& words) {
    std::cout << "    " << at << ") words='" << words << global << "' ;;\n";
  };
  std::string top;
  for (const auto* sub : app.get_subcommands(nullptr)) {
    top += sub->get_name() + " ";
    std::string inner;
    for (const auto* child : sub->get_subcommands(nullptr)) {
      inner += child->get_name() + " ";
      row(sub->get_name() + ":" + child->get_name(), option_names(*child));
    }
    row(sub->get_name() + (inner.empty() ? ":*" : ":"), inner + option_names(*sub));
  }
  row(":", top);
  std::cout << kCompletionTail;
}

/// The verb that the command line reached, and how it is typed.
std::pair<const CLI::App*, std::string> reached(const CLI::App& app) {
  const CLI::App* at = &app;
  std::string typed = app.get_name();
  while (!at->get_subcommands().empty()) {
    at = at->get_subcommands().back();
    typed += " " + at->get_name();
  }
  return {at, typed};
}

/// What is wrong with the command line: the word, and the nearest one that is known.
std::string usage_error(const CLI::App& app, const CLI::ParseError& error) {
  const auto [at, typed] = reached(app);
  const auto nearest = [](const std::string& word, const std::vector<std::string>& known) {
    const std::string name = nearest_name(word, known);
    return name.empty() ? std::string() : "; did you mean " + name + "?";
  };
  std::vector<std::string> verbs, options;
  for (const auto* sub : at->get_subcommands(nullptr)) verbs.push_back(sub->get_name());
  for (const CLI::App* const from : {at, &app})
    for (const auto* option : from->get_options()) {
      for (const std::string& name : option->get_lnames()) options.push_back("--" + name);
      for (const std::string& name : option->get_snames()) options.push_back("-" + name);
    }
  const std::vector<std::string> left = app.remaining(true);
  for (const std::string& word : left) {
    const std::string name = word.substr(0, word.find('='));
    if (name.size() > 1 && name[0] == '-')
      return str(typed, " has no option ", name, nearest(name, options));
    if (!verbs.empty()) return str(typed, " has no verb ", word, nearest(word, verbs));
  }
  if (verbs.empty()) return left.empty() ? error.what() : str(typed, " takes no ", left.front());
  std::string list;
  for (const std::string& verb : verbs) list += (list.empty() ? "" : ", ") + verb;
  return str(typed, " needs a verb: ", list);
}

void print_error(bool json, const Status& status, const std::string& more = "") {
  const Json value{
      {"error", {{"code", status_code_name(status.code())}, {"message", status.message()}}}};
  if (json) std::cout << value.dump(-1, ' ', false, Json::error_handler_t::replace) << "\n";
  std::cerr << "tandem: " << status.message() << "\n" << more;
}

int report(bool json, const Status& status) {
  if (status.ok()) return 0;
  print_error(json, status);
  return exit_code(status.code());
}

int run(int argc, char** argv) {
  Invocation in;
  CLI::App app{"Fine-tunes and serves language models on one pool of workers.", "tandem"};
  app.set_version_flag("--version", "tandem " TANDEM_VERSION);
  app.require_subcommand(1);
  app.fallthrough();
  app.add_flag("--json", in.json,
               "one JSON value on standard output (JSON lines where it streams)");
  app.add_option("--config", in.config_file, "settings file");
  add_setting(app, in, "data_dir", "where the platform lives [~/.local/share/tandem]");
  add_setting(app, in, "coordinator", "endpoint of another platform's coordinator");
  add_setting(app, in, "key_file", "key for tcp:// endpoints");
  app.footer(
      "tandem VERB --help shows options and examples. Exit codes: 0 done, 1 failed, 2 wrong "
      "usage,\n"
      "3 not found, 4 refused, 5 unreachable. Completion: eval \"$(tandem completion)\"");
  add_platform(app, in);
  add_objects(app, in);
  add_training(app, in);
  add_inference(app, in);
  add_replicas(app, in);
  add_operations(app, in);
  std::string shell = "bash";
  CLI::App* completion = app.add_subcommand("completion", "shell completion for bash or zsh");
  completion->add_option("shell", shell, "bash or zsh [bash]")
      ->check(CLI::IsMember({"bash", "zsh"}));
  completion->footer("Example:\n  eval \"$(tandem completion zsh)\"");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // help, version
    // Flags are not taken over where parsing failed.
    const bool json = std::find(argv, argv + argc, std::string_view("--json")) != argv + argc;
    print_error(json, invalid_error(usage_error(app, error)),
                str("tandem: ", reached(app).second, " --help shows what there is\n"));
    return 2;
  }
  if (completion->parsed()) {
    print_completion(app, shell);
    return 0;
  }
  auto settings = protocol::Settings::load(in.flags, in.config_file);
  if (!settings.ok()) return report(in.json, settings.status());
  Session session(std::move(*settings), in.json);
  try {
    const Status status = in.run(session);
    return report(in.json && !session.printed_json(), status);
  } catch (const Json::type_error& error) {
    constexpr int kNotUtf8 = 316;  // made of what was typed
    return report(in.json,
                  error.id == kNotUtf8
                      ? invalid_error("a name or text on the command line is not valid UTF-8")
                      : internal_error(error.what()));
  } catch (const std::exception& error) {  // a file that goes away while it is read, no memory
    return report(in.json, internal_error(error.what()));
  }
}

}  // namespace
}  // namespace tandem::tools

int main(int argc, char** argv) {
  const int code = tandem::tools::run(argc, argv);
  if (code != 0 || std::cout.flush()) return code;
  std::cerr << "tandem: standard output could not be written (is its disk full?)\n";
  return tandem::exit_code(tandem::StatusCode::kInternal);
}
