"""Deaths, hangs and failed steps: what is open goes on, and only a culprit ends."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

from aphro_core.config import SchedulerConfig
from aphro_core.messages.requests import AddSequence
from aphro_core.messages.steps import StepResult
from aphro_core.request import SamplingParams
from aphro_core.scheduler.scheduler import Scheduler
from tests.faults.case import Case, Outcome
from tests.faults.lab import EXIT, FAULTS, HANG, MEMORY, MEMORY_OF_ONE, NAN, RAISE, FaultyServer, Lab, Probe, complete
from tests.faults.load import Load, bodies, prompt_of, run_load

_NUM_REQUESTS = 16


def kill_under_load(
    server: FaultyServer,
    victim: str,
    outcome: Outcome,
    *,
    pause: float,
    max_tokens: int = 120,
    num: int = _NUM_REQUESTS,
) -> None:
    """SIGKILL a process while ``num`` requests stream; all must end as without it."""
    asked = bodies(num, max_tokens)
    expected = run_load(server.url, asked)
    with Probe(server.url) as probe:
        with Load(server.url, asked) as load:
            load.wait_tokens(20)
            killed = server.kill(victim)
        time.sleep(0.3)
    judge_load(load, expected, outcome, pause=pause)
    outcome.at_most("`/readyz` 503 after", probe.first(503, killed), 1.0)


def judge_load(load: Load, expected: list[list[int]], outcome: Outcome, *, pause: float) -> None:
    equal = sum(answer.token_ids == tokens for answer, tokens in zip(load.answers, expected, strict=True))
    outcome.figures["token-equal"] = f"{equal}/{len(expected)}"
    outcome.check("all token-equal", equal == len(expected))
    outcome.check("all HTTP 200", {answer.status for answer in load.answers} == {200})
    outcome.at_most("pause", max(answer.longest_pause for answer in load.answers), pause)
    outcome.at_most("silence", max(answer.longest_silence for answer in load.answers), 2.2)


def p01(lab: Lab) -> Outcome:
    outcome = Outcome()
    with lab.server("-tp", "2", "--max-recoveries", "9") as server:
        for rank in range(2):
            kill_under_load(server, f"aphro-rank-{rank}", outcome, pause=5.0)
    return outcome


def p02(lab: Lab) -> Outcome:
    outcome = Outcome()
    with lab.server("-pp", "2", "--max-recoveries", "9") as server:
        for rank in range(2):
            kill_under_load(server, f"aphro-rank-{rank}", outcome, pause=5.0)
    return outcome


def p03(lab: Lab) -> Outcome:
    outcome = Outcome()
    with lab.server("-tp", "2") as server:
        api = server.pid_of("aphro-api")
        kill_under_load(server, "aphro-engine", outcome, pause=8.0)
        outcome.check("API process unharmed", server.pid_of("aphro-api") == api)
    return outcome


def deterministic(lab: Lab) -> Outcome:
    """In bfloat16: each request alone, then 16 at once with a death, then where blocks are short."""
    outcome = Outcome()
    flags = ("--dtype", "bfloat16", "--deterministic", "--max-recoveries", "9")
    asked = bodies(_NUM_REQUESTS, 120)
    with lab.server("-tp", "2", *flags) as server:
        expected = [tokens for body in asked for tokens in run_load(server.url, [body])]
        with Load(server.url, asked) as load:
            load.wait_tokens(20)
            server.kill("aphro-engine")
        judge_load(load, expected, outcome, pause=8.0)
    with lab.server("-tp", "2", *flags, "--num-gpu-blocks-override", "40", "--max-model-len", "256") as server:
        outcome.check("the same after preemptions", run_load(server.url, asked) == expected)
        outcome.figures["preemptions"] = f"{server.metric('num_preemptions_total'):g}"
        outcome.check("preempted", server.metric("num_preemptions_total") > 0)
    return outcome


def p06(lab: Lab) -> Outcome:
    outcome = Outcome()
    with lab.server("-tp", "2", "--step-timeout", "2") as server:
        asked = bodies(8, 120)
        expected = run_load(server.url, asked)
        with Probe(server.url) as probe, Load(server.url, asked) as load:
            load.wait_tokens(20)
            stopped = server.kill("aphro-rank-1", signal.SIGSTOP)
        judge_load(load, expected, outcome, pause=7.0)
        outcome.at_most("`/readyz` 503 after", probe.first(503, stopped), 2.0)
        log = server.log.read_text()
        outcome.check("the stopped rank is named", "rank 1 on" in log and "is stopped (SIGSTOP)" in log)
        outcome.check("stacks logged", "most recent call first" in log)
    return outcome


def p07(lab: Lab) -> Outcome:
    outcome = Outcome()
    with lab.server("-tp", "2") as server:
        asked = bodies(8, 900)
        expected = run_load(server.url, asked)
        with Load(server.url, asked) as load:
            load.wait_tokens(20)
            for _ in range(10):
                server.kill("aphro-rank-1", signal.SIGSTOP)
                time.sleep(2.0)
                server.kill("aphro-rank-1", signal.SIGCONT)
                time.sleep(0.2)
        equal = [answer.token_ids for answer in load.answers] == expected
        outcome.check("all token-equal", equal)
        outcome.check("no restart", server.metric("engine_recoveries_total") == 0)
        outcome.figures["restarts"] = f"{server.metric('engine_recoveries_total'):g}"
    return outcome


def culprit(lab: Lab, token: int, *arguments: str, code: str, restarts: int) -> Outcome:
    """One request that meets a fault in every step of its own, among seven that do not."""
    outcome = Outcome()
    with lab.server(*arguments, faults=FAULTS) as server:
        asked = bodies(7, 100)
        expected = run_load(server.url, asked)
        answers: list[Any] = []
        ask = threading.Thread(target=lambda: answers.append(complete(server.url, [*prompt_of(9), token])))
        with Load(server.url, asked) as load:
            load.wait_tokens(10)
            ask.start()
        ask.join(60)
        judge_load(load, expected, outcome, pause=5.0)
        (answer,) = answers
        outcome.check("the culprit gets 500", answer.status_code == 500)
        outcome.check(f"its code is {code}", answer.json()["error"]["code"] == code)
        found = int(server.metric("engine_recoveries_total"))
        outcome.figures["restarts"] = str(found)
        outcome.check(f"at most {restarts} restarts", found <= restarts)
        outcome.check("ready afterwards", complete(server.url, prompt_of(1)).status_code == 200)
    return outcome


def p08(lab: Lab) -> Outcome:
    return culprit(lab, RAISE, code="step_failed", restarts=0)


def p08_of_two(lab: Lab) -> Outcome:
    """On a group: a rank whose step fails still takes part in what its peers wait for, and no process has to end."""
    return culprit(lab, RAISE, "-tp", "2", code="step_failed", restarts=0)


def p08_of_stages(lab: Lab) -> Outcome:
    return culprit(lab, RAISE, "-tp", "2", "-pp", "2", code="step_failed", restarts=0)


def p09(lab: Lab) -> Outcome:
    return culprit(lab, MEMORY, code="step_failed", restarts=0)


def p09_of_one_rank(lab: Lab) -> Outcome:
    """Memory runs out on one rank of two, in the middle of the step: the other one has computed it."""
    return culprit(lab, MEMORY_OF_ONE, "-tp", "2", code="step_failed", restarts=0)


def p11(lab: Lab) -> Outcome:
    return culprit(lab, NAN, "-tp", "2", code="step_failed", restarts=0)


def poison(lab: Lab) -> Outcome:
    """A request under which a worker ends by itself, every time."""
    return culprit(lab, EXIT, "-tp", "2", code="poison_request", restarts=2)


def hanging(lab: Lab) -> Outcome:
    """A request whose step never ends."""
    outcome = Outcome()
    with lab.server("-tp", "2", "--step-timeout", "1", faults=FAULTS) as server:
        began = time.monotonic()
        answer = complete(server.url, [*prompt_of(9), HANG])
        outcome.at_most("answered", time.monotonic() - began, 8.0)
        outcome.check("500", answer.status_code == 500)
        outcome.check("poison_request", answer.json()["error"]["code"] == "poison_request")
        again = complete(server.url, [*prompt_of(9), HANG])
        outcome.check("then refused at once", again.status_code == 400)
        outcome.check("others are served", complete(server.url, prompt_of(1)).status_code == 200)
    return outcome


def tokens_computed(num: int, num_prompt: int, num_output: int, num_blocks: int) -> int:
    """By all steps of the scheduler, for that many sequences at once."""
    scheduler = Scheduler(SchedulerConfig(), num_blocks=num_blocks, block_size=16, max_model_len=256)
    for seq_id in range(1, num + 1):
        prompt = [seq_id * 1000 + position for position in range(num_prompt)]
        scheduler.add(AddSequence(seq_id, prompt, SamplingParams(), 0, num_output, []))
    computed = 0
    while (plan := scheduler.schedule()) is not None:
        computed += plan.num_tokens
        drawn = [row.seq_id * 1000 + row.start for row in plan.scheduled if row.samples]
        scheduler.update(StepResult(plan.step_id, drawn))
    return computed


def p10(lab: Lab) -> Outcome:
    outcome = Outcome()
    asked = bodies(8, 200)
    with lab.server() as server:
        expected = run_load(server.url, asked)
    needed = 8 * -(-220 // 16)
    small = ("--num-gpu-blocks-override", str(needed // 4), "--max-model-len", "256")
    with lab.server("--skip-tokenizer-init", "--dtype", "float32", *small, small=False) as server:
        found = run_load(server.url, asked)
        outcome.check("all token-equal", found == expected)
        preemptions = server.metric("num_preemptions_total")
        outcome.figures["preemptions"] = f"{preemptions:g}"
        outcome.check("at least 10 preemptions", preemptions >= 10)
        computed, least = tokens_computed(8, 20, 200, needed // 4), 8 * (20 + 200 - 1)
        outcome.figures["computed again"] = f"{(computed - least) / least:.0%}"
        outcome.check("at most half again", computed <= 1.5 * least)
        outcome.check("one that never fits: 400", complete(server.url, prompt_of(1), 300).status_code == 400)
    return outcome


def budget(lab: Lab) -> Outcome:
    """More deaths than the budget: every request gets an error, and the process its own exit code."""
    outcome = Outcome()
    with lab.server("-tp", "2", "--max-recoveries", "1") as server:
        with Load(server.url, bodies(4, 900)) as load:
            load.wait_tokens(5)
            server.kill("aphro-engine")
            load.wait_tokens(60)
            killed = server.kill("aphro-engine")
        outcome.at_most("ended", time.monotonic() - killed, 3.0)
        outcome.check("all have an error", all(answer.error is not None for answer in load.answers))
        outcome.check("exit code 8", server.process.wait(10) == 8)
        server.wait_all_gone(3)
    return outcome


def p45(lab: Lab) -> Outcome:
    """From the first request on the API process and every worker raise when they unpickle."""
    outcome = Outcome()
    with lab.server("-tp", "2", faults="pickle=armed") as server:
        kill_under_load(server, "aphro-rank-1", outcome, pause=5.0, max_tokens=60)
        outcome.check("nothing was unpickled", "something was unpickled" not in server.log.read_text())
    return outcome


CASES = [
    Case("P-01", "SIGKILL of each TP worker under 16 requests", p01, is_fast=True),
    Case("P-02", "SIGKILL of each PP worker under 16 requests", p02),
    Case("P-03", "SIGKILL of the engine under 16 requests", p03),
    Case("P-06", "SIGSTOP of a worker, for good; step deadline 2 s", p06, is_fast=True),
    Case("P-07", "SIGSTOP of a worker for 2 s, ten times", p07),
    Case("P-08", "an exception in forward, in every step of one request", p08, is_fast=True),
    Case("P-08b", "the same on two ranks", p08_of_two, is_fast=True),
    Case("P-08c", "the same on two ranks of two stages each", p08_of_stages),
    Case("P-09", "an allocation failure in every step of one request", p09),
    Case("P-09b", "the same on one of two ranks, in the middle of the step", p09_of_one_rank),
    Case("P-10", "KV cache for a quarter of the demand", p10),
    Case("P-11", "NaN logits of one request", p11),
    Case("P-45", "an unpickler armed to raise, and a death", p45),
    Case("R1", "bfloat16 with --deterministic: alone, 16 at once with a death, preempted", deterministic),
    Case("R5", "two deaths, a budget of one", budget),
    Case("R3a", "a request under which a worker exits, every time", poison, is_fast=True),
    Case("R2", "a request whose step never ends; step deadline 1 s", hanging),
]
