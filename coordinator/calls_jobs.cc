// Verbs of jobs: submission with its dry run, streams of events, changes.
#include "coordinator/calls.h"
#include "coordinator/resolve.h"
#include "coordinator/views.h"

#include <algorithm>

namespace tandem::coordinator {
namespace {

constexpr std::size_t kJobIdBytes = 16;  // as Jobs::submit makes them

StatusCode code_of(const std::string& name) {
  for (int code = 0; code <= static_cast<int>(StatusCode::kConflict); ++code)
    if (name == status_code_name(static_cast<StatusCode>(code)))
      return static_cast<StatusCode>(code);
  return StatusCode::kInternal;
}

}  // namespace

Result<protocol::JobSpec> Calls::check_spec(const std::string& json, Jobs::Submission& submission) {
  TANDEM_ASSIGN_OR_RETURN(protocol::JobSpec spec, protocol::JobSpec::parse(json));
  TANDEM_ASSIGN_OR_RETURN(const ModelRecord* model, find_model(context_.tables(), spec.model));
  submission.model = model->digest;
  if (spec.dataset.empty()) return invalid_error("a job needs a dataset; upload one with data.add");
  TANDEM_ASSIGN_OR_RETURN(const Dataset* data, find_dataset(context_.tables(), spec.dataset));
  submission.dataset = data->root;
  if (!spec.eval_dataset.empty()) {
    TANDEM_ASSIGN_OR_RETURN(data, find_dataset(context_.tables(), spec.eval_dataset));
    submission.eval_dataset = data->root;
  } else if (spec.train.eval_steps > 0 && spec.train.eval_split == 0.0) {
    return invalid_error(str("eval_steps ", spec.train.eval_steps,
                             " asks for evaluations, and there is nothing to evaluate on; give "
                             "eval_data (--eval-data) or eval_split, or leave eval_steps out"));
  }
  TANDEM_RETURN_IF_ERROR(check_published_name(spec));
  return spec;
}

/// The name must be free when the job ends; for a model's that means that nobody else has it or
/// will have it.
Status Calls::check_published_name(const protocol::JobSpec& spec) const {
  const bool full = spec.train.full();
  const std::string& name = spec.published_name();
  TANDEM_RETURN_IF_ERROR(check_name(full ? "a model's name" : "an adapter's name", name,
                                    context_.limits().name_bytes_max));
  return check_unpromised(context_.tables(), name, full);
}

void Calls::job_submit(const Ask& ask, Params& params) {
  const std::string spec_json = params.object("spec", true);
  Jobs::Submission submission;
  submission.name = params.text("name", false);
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  if (submission.name.size() > context_.limits().name_bytes_max)
    return reply(ask, invalid_error(str("a job's name must have at most ",
                                        context_.limits().name_bytes_max, " characters")));
  auto spec = check_spec(spec_json, submission);
  if (!spec.ok()) return reply(ask, spec.status());
  submission.tenant = ask.user;
  submission.idempotency_key = ask.key;
  submission.spec = std::move(*spec);
  auto id = jobs_.submit(submission);
  if (!id.ok()) return reply(ask, id.status());
  // In the job's own transaction: a repeat after a crash finds the job, not a second one.
  remember(ask, dump({{"job", id->value}}));
  submit_asks_.emplace_back(*id, ask);
}

void Calls::answer_submit(const Ask& ask, const Job& job) {
  const bool refused_at_once = job.state == JobState::kFailed && job.started_unix_ms == 0;
  if (refused_at_once)
    return send_reply(ask, Status(code_of(job.error_code), job.error), "", false);
  send_reply(ask, {},
             dump({{"job", job.id.value},
                   {"state", job_state_name(job.state)},
                   {"position", jobs_.queue_position(job.id)},
                   {"reason", jobs_.waiting_reason(job)},
                   {"estimate", parse_object(job.estimate_json)}}),
             false);
}

void Calls::job_list(const Ask& ask, Params& params) {
  const std::string state = params.text("state", false);
  const auto max = static_cast<std::int64_t>(context_.limits().page_max);
  const auto limit = params.integer("limit", max, 1, max);
  const std::string after = params.text("after", false);
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  std::string states;
  bool known = state.empty();
  for (auto s = JobState::kEstimating; s <= JobState::kCancelled;
       s = static_cast<JobState>(static_cast<int>(s) + 1)) {
    known = known || state == job_state_name(s);
    states += str(states.empty() ? "" : ", ", job_state_name(s));
  }
  if (!known)
    return reply(ask,
                 invalid_error(str("job.list: no job is \"", state, "\"; states are ", states)));
  // The last one of the page before may be in another state by now.
  const auto last = context_.tables().jobs.find(JobId(after));
  if (!after.empty() && last == context_.tables().jobs.end())
    return reply(ask, conflict_error(str("no page follows ", after, ": it was removed meanwhile; ",
                                         "list from the beginning again")));
  std::vector<const Job*> jobs;
  for (const auto& [id, job] : context_.tables().jobs)
    if ((state.empty() || state == job_state_name(job.state)) &&
        (after.empty() || job.order < last->second.order))
      jobs.push_back(&job);
  std::sort(jobs.begin(), jobs.end(),
            [](const Job* a, const Job* b) { return a->order > b->order; });
  Json items = Json::array();
  std::string next;
  for (const Job* job : jobs) {
    if (static_cast<std::int64_t>(items.size()) >= limit) {
      next = items.back()["job"].get<std::string>();
      break;
    }
    items.push_back(job_json(*job, jobs_, context_.tables()));
  }
  answer(ask, {{"jobs", std::move(items)}, {"next", next}});
}

void Calls::job_show(const Ask& ask, Params& params) {
  const std::string id = params.text("job");
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  auto job = find_job(context_.tables(), id);
  if (!job.ok()) return reply(ask, job.status());
  answer(ask, job_details_json(**job, jobs_, context_.tables()));
}

void Calls::change_job(const Ask& ask, Params& params,
                       const std::function<Status(const JobId&)>& change) {
  const std::string id = params.text("job");
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  auto job = find_job(context_.tables(), id);
  if (!job.ok()) return reply(ask, job.status());
  const JobId job_id = (*job)->id;
  if (Status status = change(job_id); !status.ok()) return reply(ask, status);
  answer(ask, job_json(context_.tables().jobs.at(job_id), jobs_, context_.tables()));
}

void Calls::job_cancel(const Ask& ask, Params& params) {
  change_job(ask, params, [this](const JobId& id) { return jobs_.cancel(id); });
}
void Calls::job_pause(const Ask& ask, Params& params) {
  change_job(ask, params, [this](const JobId& id) { return jobs_.pause(id); });
}

/// Where it needs a dry run, that comes first: what is refused stays paused or failed.
void Calls::job_resume(const Ask& ask, Params& params) {
  const std::string name = params.text("job"), layout = params.object("layout", false);
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  auto found = find_job(context_.tables(), name);
  if (!found.ok()) return reply(ask, found.status());
  const JobId id = (*found)->id;
  const auto resume = [this, id, layout](const std::string& estimate) -> Result<Json> {
    TANDEM_RETURN_IF_ERROR(jobs_.resume(id, layout, estimate));
    return job_json(context_.tables().jobs.at(id), jobs_, context_.tables());
  };
  const auto job = jobs_.resumable(id, layout);
  if (!job.ok()) return reply(ask, job.status());
  const ModelRecord* model = context_.tables().model_by_digest(job->model);
  const auto spec = protocol::JobSpec::parse(job->spec_json);
  if (job->estimate_json.empty() && model != nullptr && spec.ok() && workers_.engines_alive() > 0) {
    if (const std::string run = start_dry_run(ask, resume); !run.empty())
      estimates_.ask(run, model_ref(*model), spec->train, spec->evaluates(), true);
    return;
  }
  const auto resumed = resume("");
  resumed.ok() ? answer(ask, *resumed) : reply(ask, resumed.status());
}

void Calls::job_rm(const Ask& ask, Params& params) {
  const std::string name = params.text("job");
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  auto job = find_job(context_.tables(), name);
  if (!job.ok()) return reply(ask, job.status());
  if (Status status = jobs_.remove((*job)->id); !status.ok()) return reply(ask, status);
  answer(ask, Json::object());
}

void Calls::job_restore(const Ask& ask, Params& params) {
  const JobId id(params.text("job"));
  const std::string spec_json = params.object("spec", true), model = params.text("model");
  const std::string dataset = params.text("dataset"), eval = params.text("eval_dataset", false);
  const std::int64_t step = params.integer("step", -1, 0, INT64_MAX);
  VerifyManifest verify{params.text("manifest", false), ManifestKind::kCheckpoint};
  if (verify.text.empty()) verify.blob = params.digest("manifest_digest");
  Jobs::Submission submission;
  submission.name = params.text("name", false);
  const auto check = [&]() -> Status {
    TANDEM_RETURN_IF_ERROR(params.finish());
    if (!id.value.starts_with("job-") || id.value.size() != kJobIdBytes ||
        id.value.find_first_not_of("0123456789abcdef", 4) != std::string::npos)
      return invalid_error(str("a job's id is job- and 12 hex digits, not ", id));
    if (submission.name.size() > context_.limits().name_bytes_max)
      return invalid_error(
          str("a job's name must have at most ", context_.limits().name_bytes_max, " characters"));
    // Its model and data by digest: here they may have other names.
    TANDEM_ASSIGN_OR_RETURN(submission.spec, protocol::JobSpec::parse(spec_json));
    TANDEM_ASSIGN_OR_RETURN(const ModelRecord* base, find_model(context_.tables(), model));
    submission.model = base->digest;
    TANDEM_ASSIGN_OR_RETURN(const Dataset* data, find_dataset(context_.tables(), dataset));
    submission.dataset = data->root;
    if (!eval.empty()) {
      TANDEM_ASSIGN_OR_RETURN(data, find_dataset(context_.tables(), eval));
      submission.eval_dataset = data->root;
    }
    if (context_.tables().jobs.contains(id)) return {};  // it holds its name already
    return check_published_name(submission.spec);
  };
  if (const Status status = check(); !status.ok()) return reply(ask, status);
  submission.tenant = ask.user;
  start(ask, std::move(verify),
        [this, id, submission, step](const Ask& first, const WorkResult& result) {
          const auto& verified = std::get<ManifestVerified>(result);
          if (verified.base_model != submission.model)
            return reply(first, invalid_error(str("the checkpoint is of base ",
                                                  verified.base_model.short_hex(), ", ", id, " of ",
                                                  submission.model.short_hex())));
          if (const Status status = jobs_.restore(id, submission, step, verified); !status.ok())
            return reply(first, status);
          answer(first, job_json(context_.tables().jobs.at(id), jobs_, context_.tables()));
        });
}

void Calls::job_watch(const Ask& ask, Params& params) {
  open_stream(ask, params, false);
}
void Calls::job_logs(const Ask& ask, Params& params) {
  open_stream(ask, params, true);
}

void Calls::open_stream(const Ask& ask, Params& params, bool logs) {
  const std::string id = params.text("job");
  Stream stream;
  stream.ask = ask;
  stream.logs = logs;
  stream.sent = static_cast<std::uint64_t>(params.integer("after", 0, 0, INT64_MAX));
  stream.follow = logs ? params.boolean("follow", false) : true;
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  auto job = find_job(context_.tables(), id);
  if (!job.ok()) return reply(ask, job.status());
  stream.job = (*job)->id;
  const StreamKey key(ask.peer, ask.call_id);
  if (streams_.size() >= context_.limits().streams_max && !streams_.contains(key))
    return reply(ask, busy_error(str("all ", context_.limits().streams_max,
                                     " places for streams are taken; retry after ",
                                     context_.limits().retry_after_ms, " ms")));
  const auto* kept = jobs_.events(stream.job);
  const bool complete = kept != nullptr && !kept->empty() && kept->front().seq <= stream.sent + 1;
  if (!complete && (*job)->events > stream.sent) {
    // Older than this process: the registry has them.
    stream.loading = true;
    streams_[key] = stream;
    return start(ask, ReadEvents{stream.job, context_.limits().events_kept},
                 [this, key](const Ask&, const WorkResult& result) {
                   const auto open = streams_.find(key);
                   if (open == streams_.end()) return;
                   Stream& waiting = open->second;
                   waiting.loading = false;
                   for (const JobEventRecord& event : std::get<EventsRead>(result).events)
                     stream_event(waiting, event);
                   if (!feed(waiting)) streams_.erase(open);
                 });
  }
  if (feed(stream)) streams_[key] = stream;
}

/// Sends what is in memory; false when the stream is over (its last reply was sent).
bool Calls::feed(Stream& stream) {
  if (const auto* kept = jobs_.events(stream.job))
    for (const JobEventRecord& event : *kept) stream_event(stream, event);
  const auto job = context_.tables().jobs.find(stream.job);
  if (job != context_.tables().jobs.end() && stream.follow && !is_terminal(job->second.state))
    return true;
  end_stream(stream);
  return false;
}

void Calls::stream_event(Stream& stream, const JobEventRecord& event) {
  if (event.seq <= stream.sent) return;
  stream.sent = event.seq;
  send_reply(stream.ask, {}, dump(stream.logs ? log_json(event) : event_json(event)), true);
}

void Calls::end_stream(const Stream& stream) {
  const auto found = context_.tables().jobs.find(stream.job);
  if (found == context_.tables().jobs.end())
    return send_reply(stream.ask, not_found_error(str("no job ", stream.job)), "", false);
  const Job& job = found->second;
  send_reply(stream.ask, {},
             dump({{"job", job.id.value},
                   {"state", job_state_name(job.state)},
                   {"adapter", published_name(job)},
                   {"method", job.full ? "full" : "lora"},
                   {"digest", job.published.empty() ? "" : job.published.hex()},
                   {"summary", parse_object(job.summary_json)},
                   {"error", job.error}}),
             false);
}

void Calls::estimate(const Ask& ask, Params& params) {
  const std::string name = params.text("model");
  const std::string train = params.object("train", false);
  const bool eval_data = params.boolean("eval_data", false);
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  auto settings = protocol::TrainSettings::parse(train.empty() ? "{}" : train);
  if (!settings.ok()) return reply(ask, settings.status());
  auto model = find_model(context_.tables(), name);
  if (!model.ok()) return reply(ask, model.status());
  const auto answered = [this, train = *settings](const std::string& result) -> Result<Json> {
    Json json = parse_object(result);
    if (const Status pool = jobs_.check_pool(train, result); !pool.ok())
      json["pool"] = pool.message();
    return json;
  };
  const std::string id = start_dry_run(ask, answered);
  if (!id.empty())
    estimates_.ask(id, model_ref(**model), *settings, eval_data || settings->eval_split > 0.0,
                   false);
}

}  // namespace tandem::coordinator
