"""What launchers, frameworks and the kernel say of a rank that failed: NCCL itself may have had no chance to."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.nccl_log.error_rule import Tier
from aphro_core.doctor.nccl_log.error_rule import rule as _rule

# UCX, Open MPI, Python, Slurm and Abseil, in this order
_CRASH = r"(?:Caught signal \d+ \(|Signal: |Fatal Python error: |task [\d,-]+: |\*\*\* )"
_NOT_NCCLS = r"(?!.*(?:NCCL|nccl))"

PROGRAM_ERRORS: Final = (
    # codes that mean a fault of the GPU, the board or the driver; others are mostly of the program
    _rule("log.xid", Tier.CAUSE, r"NVRM: Xid \((?:PCI:)?(?P<bus>[\w:.]+)\): "
          r"(?P<code>48|6[1-4]|74|79|92|9[45]|119|120|13[67]|14[03]|154)\b",
          "the kernel reports a fault of GPU {bus}: Xid {code}"),
    _rule("log.host-memory", Tier.CAUSE, r"out of memory: Killed process (?P<who>\d+(?: \([^)]*\))?)|oom_kill event"
          r"|task \d+: Out Of Memory|OOMKilled|memory pressure \(OOM\)|due to the node running low on memory",
          "the host ran out of memory, and the kernel killed a process: {who}"),
    _rule("log.shm-small", Tier.CAUSE, r"bus error encountered|Signal 7 \(SIGBUS\)|exitcode *: -7\b|"
          + _CRASH + r"(?:Bus error|SIGBUS)",
          "a process died of a bus error: /dev/shm is full or too small"),
    _rule("log.rank-died", Tier.WEAK, r"exit ?code *: *-(?P<signal>9|11|4)\b(?:\) local_rank: (?P<rank>\d+))?"
          r"|Signal (?P<number>9|11|4) \(SIG|exited on signal (?P<mpi>9|11|4)\b|exit code (?P<shell>137|139)\b",
          "a process was killed or crashed: signal {signal}{number}{mpi}{shell}, local rank {rank}"),
    _rule("log.rank-died", Tier.WEAK, _CRASH + r"(?P<what>Segmentation fault|SIGSEGV|Illegal instruction|SIGILL)"
          r"|line \d+: +\d+ (?P<shell>Killed|Segmentation fault)|(?P<torch>Segfault) encountered",
          "a process was killed or crashed: {what}{shell}{torch}"),
    _rule("log.loopback", Tier.CAUSE, r"(?i:gloo).*\[?(?P<peer>127\.[\d.]+)", "Gloo was told to connect to {peer}"),
    _rule("log.gloo", Tier.WEAK, r"Gloo connectFullMesh failed", "Gloo could not connect the ranks"),
    _rule("log.cuda-memory", Tier.CAUSE, r"Test CUDA failure.*out of memory", "a GPU ran out of memory"),
    _rule("log.cuda-memory", Tier.CAUSE, r"CUDA error: out of memory.*|OutOfMemoryError: CUDA out of memory"
          r"|CUDA out of memory\. Tried", "a GPU ran out of memory", in_prose=True),
    _rule("log.fabric", Tier.CAUSE, r"(?:Error 802|Test CUDA failure).*system not yet initialized",
          "the NVSwitch fabric is not initialised"),
    _rule("log.fabric", Tier.CAUSE, r"CUDA error.*system not yet initialized",
          "the NVSwitch fabric is not initialised", in_prose=True),
    _rule("log.cuda", Tier.CAUSE, r"Test CUDA failure \S+ (?P<test>.*)", "a CUDA call failed: {test}"),
    _rule("log.cuda", Tier.CAUSE, r"\b(?:CUDA|HIP) error: (?P<why>.*)", "a CUDA call failed: {why}", in_prose=True),
    # at DEBUG idle workers say it too
    _rule("log.engine-wait", Tier.NOTE,
          r"^(?!.{0,200}\bDEBUG )(?:.{0,200}?\((?P<who>[\w. -]{1,60}?pid=\d+)[^)]{0,80}\))?"
          r".{0,400}?(?P<at>)No available (?:shared memory )?(?:broadcast )?block found in (?P<seconds>\d+) ?s",
          "a process of the engine waits {seconds} s for another one: {who}", in_prose=True),
    _rule("log.engine-timeout", Tier.SYMPTOM, r"TimeoutError: RPC call to (?P<call>\w+) timed out"
          r"|Watchdog timeout \(self\.watchdog_timeout|Timed out waiting for engine core",
          "the engine gave up waiting for a worker: {call}", in_prose=True),
    _rule("log.worker-lost", Tier.CONSEQUENCE, r"A worker died or was killed while executing a task"
          r"|Worker proc (?P<name>[\w.-]+) died unexpectedly|Worker (?P<old>\w+) pid \d+ died, exit code: -?\d+",
          "a worker of the framework is gone: {name}{old}"),
    _rule("log.wrong-data", Tier.CAUSE, r"Out of bounds values : (?P<number>\d+) FAILED",
          "nccl-tests got {number} wrong values: data is damaged on its way"),
    _rule("log.rendezvous", Tier.WEAK, r"store->get\('[^']*'\) got error: (?P<why>.*)"
          r"|DistStoreError: (?P<store>.*)|The client socket has timed out after .*?connect to (?P<peer>[^.]*[\d)])",
          "ranks did not meet at the rendezvous: {why}{store}{peer}"),
    _rule("log.program", Tier.SUSPECT, r"\[rank(?P<rank>\d+)\]: " + _NOT_NCCLS
          + r"(?P<what>(?!Dist|torch\.distributed)(?:\w+\.)*\w*(?:Error|Exception): .*)",
          "the program of rank {rank} ended with {what}"),
)  # fmt: skip
