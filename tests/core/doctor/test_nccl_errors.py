"""Every wording of the error table, found under its own row."""

from __future__ import annotations

import time

import pytest

from aphro_core.doctor.nccl_log.error_table import ERRORS
from aphro_core.doctor.nccl_log.topics import TOPICS
from tests.core.doctor.logs import info, read, scan, warn

COMPLETION = "NET/IB : Got completion from peer 10.0.0.2<44206> with "
SAMPLES = [
    ("log.dup-gpu", "Duplicate GPU detected : rank 3 and rank 0 both on CUDA device f000"),
    ("log.dup-gpu", "Multiple Ranks are using the same GPU"),
    ("log.mismatch", "Mismatched collective detected, please check your collective calls at and around rank 39."),
    ("log.mismatch", "NET/IB : req 0/1 tag 7 peer 10.0.0.2<4> collective mismatch error, local size 8 remote size 16"),
    ("log.version", "Mismatched NCCL version detected : rank 0 version 22304 rank 1 version 22203"),
    ("log.rank-count", "bootstrapRoot: mismatch in rank count from procs 4 : 8"),
    ("log.port-busy", "Call to bind failed : Address already in use"),
    ("log.nofile", "Call to socket failed : Too many open files"),
    ("log.shm-small", "Error: failed to extend /dev/shm/nccl-JS15EH to 9637892 bytes, error: No space left on device"),
    ("log.shm-small", "Error while creating shared memory segment /dev/shm/nccl-JS (size 9), error: No space left"),
    ("log.shm-small", "Call to posix_fallocate failed : No space left on device"),
    ("log.shm-gone", "Error while attaching to shared memory segment /dev/shm/nccl-jf (size 14), error: No such file"),
    ("log.ib-timeout", f"{COMPLETION}error 12, opcode 1, len 0, vendor err 129"),
    ("log.ib-timeout", "NET/IB : Got completion with error 12, opcode 1, len 0, vendor err 129"),
    ("log.ib-timeout", f"{COMPLETION}status=12 opcode=129 len=65536 vendor err 129 (Recv) localGid ::ffff:10.0.0.1"),
    ("log.ib-timeout", f"{COMPLETION}status=IBV_WC_RETRY_EXC_ERR(12) opcode=IBV_WC_SEND(0) reqSize=0"),
    ("log.ib-protection", f"{COMPLETION}error 4, opcode 32630, len 32629, vendor err 81"),
    ("log.ib-protection", f"{COMPLETION}status=IBV_WC_REM_ACCESS_ERR(10) opcode=0"),
    ("log.ib-flush", f"{COMPLETION}status=5 opcode=32656 len=32659 vendor err 249 (Recv)"),
    ("log.ib-flush", "communicator encountered a fatal error (detected in ncclIbIrecv)"),
    ("log.ib-rnr", f"{COMPLETION}status=13 opcode=1"),
    ("log.ib-completion", f"{COMPLETION}status=9 opcode=1"),
    ("log.ib-event", "NET/IB : mlx5_0:1 Got async event : port error"),
    ("log.ib-event", "NET/IB : mlx5_2:1 Got async fatal event: local catastrophic error"),
    ("log.ib-event", "NET/IB : mlx5_0:1 Got non-fatal async event: port error(10)"),
    ("log.ib-event", "NET/IB : mlx5_0:1 async fatal event on QP (0x7f00): local access violation work queue error"),
    ("log.ib-event", "NET/IB : mlx5_3:1 async fatal event on QP (0x7f00): invalid request local work queue error"),
    ("log.ib-event", "NET/IB : mlx5_0:1 async fatal event: local catastrophic error"),
    ("log.ib-nomem", "Call to ibv_reg_mr_iova2 failed with error Cannot allocate memory"),
    ("log.ib-nomem", "Call to ibv_create_cq failed with error Cannot allocate memory errno 12"),
    ("log.ib-nomem", "NET/OFI Unable to register memory (type = 2). RC: -12, Error: Cannot allocate memory"),
    ("log.ib-nomem", "Call to ibv_create_qp failed"),
    ("log.ib-register", "Call to ibv_reg_mr failed with error Bad address"),
    ("log.ib-register", "NET/OFI Could not register memory on rail 0 with flag 0"),
    ("log.ib-register", "NET/OFI Unable to register memory (type = 2) for device 1. RC: -14, Error: Bad address"),
    ("log.ib-mixed", "NET/IB : Remote device mlx5_1:1 is incompatible with the local device mlx5_0:1"),
    ("log.ib-rail", "Call to ibv_modify_qp failed with error Connection timed out"),
    ("log.ib-rail", "Call to ibv_modify_qp failed with 110 Connection timed out, on dev mlx5_1:1, curr state INIT"),
    ("log.ib-unreachable", "Call to ibv_modify_qp failed with 101 Network is unreachable, on dev mlx5_1:1"),
    ("log.ib-gid", "Call to ibv_modify_qp failed with error Invalid argument errno 22"),
    ("log.ib-gid", "Call to ibv_modify_qp failed with error No such device"),
    ("log.ib-gid", "NET/IB: read failed in ncclIbRoceGetVersionNum: Invalid argument"),
    ("log.ib-warn", "NET/IB : Could not find real path of rxe0 (/sys/class/infiniband/rxe0/device)"),
    ("log.ib-open", "NET/IB : Unable to open device mlx5_0"),
    ("log.ib-call", "Call to ibv_query_port failed with error Invalid argument"),
    ("log.nic-count", "Detected mixed local Net device counts across ranks"),
    ("log.ofi-rails", "NET/OFI Unexpected number of remote rails for dev 0. Expected 3 but got 2"),
    ("log.ofi-peer", "NET/OFI Request 0x7f completed with error. RC: 103. Error: 4126 (Unresponsive receiver (rea"),
    ("log.ofi-peer", "NET/OFI Unable to insert remote address into address vector for device 1. RC: 0"),
    ("log.ofi-error", "NET/OFI Request 0x7f completed with error. RC: 5. Error: 4099 (Bad queue). Completed length: 0"),
    ("log.ofi-error", "NET/OFI Request completed with error. RC: 21. Error: unknown error. Completed length: 0"),
    ("log.provider-timeout", "0xad:0xbe, nic 0, enp12s0, 172.16.0.1<39187><-172.16.0.9<46723> rx rx ctrl timeout"),
    ("log.no-plugin-start", "NET/FasTrak Plug-in core initialization failed, aborting"),
    ("log.net-name", "Error: network AWS Libfabric not found."),
    ("log.no-plugin-start", "NET/OFI aws-ofi-nccl initialization failed"),
    ("log.no-plugin-start", "NET/OFI Could not find any optimal provider"),
    ("log.no-network", "Failed to initialize any NET plugin"),
    ("log.ofi-warn", "NET/OFI Creating new endpoint for domain 0x7f9befa99380 failed: Invalid argument"),
    ("log.no-interface", "Bootstrap : no socket interface found"),
    ("log.no-interface", "NET/Socket : no interface found"),
    ("log.no-interface", "ncclSocketInit: connecting to address  with family 59936 is neither AF_INET(2) nor AF_IN"),
    ("log.family", "Call to socket failed : Address family not supported by protocol"),
    ("log.wrong-peer", "socketFinalizeAccept: wrong type 4 != 3"),
    ("log.wrong-peer", "NET/Socket : message truncated : receiving 696320 bytes instead of 32768"),
    ("log.wrong-peer", "Message truncated : received 1024 bytes instead of 256"),
    ("log.loopback", "Net : Connect to 127.0.0.1<56849> failed : Connection refused"),
    ("log.link-local", "socketStartConnect: Connect to fe80::966d:ae03:a2:8cf0%ib1<17943> failed : Software caused"),
    ("log.link-local", "socketStartConnect: Connect to 169.254.0.1<40815> failed : Software caused connection abort"),
    ("log.no-route", "socketPollConnect: Connect to 10.0.0.5<56849> returned 113(No route to host) errno 115"),
    ("log.no-route", "Net : Connect to 10.0.0.5<56849> failed : No route to host"),
    ("log.tcp-timeout", "Net : Connect to 10.0.0.5<56849> failed : Connection timed out"),
    ("log.tcp-timeout", "socketPollConnect: Connect to 10.0.0.5<56849> returned 110(Connection timed out) errno 115"),
    ("log.refused", "Call to connect timeout : Connection refused"),
    ("log.refused", "socketStartConnect: Connect to 10.0.0.5<56849> failed : Connection refused"),
    ("log.connect", "socketStartConnect: Connect to 10.0.0.2<45763> failed : Software caused connection abort"),
    ("log.connect", "[Proxy Service 11] Failed to execute operation Connect from rank 11, retcode 2"),
    ("log.tcp-timeout", "socketPollConnect poll() returned 1, no POLLOUT events"),
    ("log.dns", "Call to getaddrinfo failed : Name or service not known"),
    ("log.p2p-nvlink", "P2P is disabled between NVLINK connected GPUs 1 and 0. This should not be the case"),
    ("log.p2p-pcie", "P2P is disabled between connected GPUs 6 and 7. You can repress this message"),
    ("log.peer-map", "Cuda failure 711 'peer mapping resources exhausted'"),
    ("log.p2p-denied", "failed to open CUDA IPC handle : 217 peer access is not supported between these"),
    ("log.p2p-denied", "Cuda failure 217"),
    ("log.nvls", "Failed to bind NVLink SHARP (NVLS) Multicast memory of size 2097152 : CUDA error 1"),
    ("log.nvls", "NVLS Multicast memory bind failed"),
    ("log.imex", "MNNVL (cliqueSize 8) is available but not working on some system."),
    ("log.imex", "MNNVL is not supported on this system"),
    ("log.nvlink-down", "MNNVL topology: rank 3 busId 1000 has no active NVLinks; NVLS will be unavailable"),
    ("log.fabric", "Cuda failure 802 'system not yet initialized'"),
    ("log.cuda-memory", "Cuda failure 2 'out of memory'"),
    ("log.cuda", "Cuda failure 'invalid argument'"),
    ("log.cuda", "HIP failure: 'invalid device function'"),
    ("log.no-libcuda", "Failed to find CUDA library libcuda.so (NCCL_CUDA_PATH='') : libcuda.so: cannot open shared"),
    ("log.nvml", "nvmlInit() failed: Driver/library version mismatch"),
    ("log.topology", "Failed to find reverse path from remNode 0/200000 nlinks 3 to node 0/700000"),
    ("log.topology", "XML Import Channel : dev 1 not found."),
    ("log.topology", "Error : too many XML nodes (max 256)"),
    ("log.topology", "Could not find NET with id 0"),
    ("log.heartbeat", "socketProgress: Connection closed by remote peer n2<41000>"),
    ("log.heartbeat", "[Proxy Service 0] Failed to execute operation Connect from rank 0, retcode 3"),
    ("log.heartbeat", "Socket recv failed"),
    ("log.heartbeat", "socketProgressOpt: Call to send to 10.0.0.9<52905> failed : Connection reset by peer"),
    ("log.numa", "NUMA auto balancing enabled which can lead to variability in the RCCL performance!"),
    ("log.numa", 'Missing "iommu=pt" from kernel command line which can lead to system instablity or hang!'),
]  # fmt: skip
BARE = [
    ("log.watchdog", "[rank3]:[E] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, OpType=ALLREDUCE,"
     " NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600010 milliseconds before timing out."),
    ("log.watchdog", "[F] [Rank 0] Terminating the process after attempting to dump debug info, due to ProcessGroupNCCL"
     " watchdog hang."),
    ("log.watchdog", "[rank2]:[F] [PG 0 Rank 2] Heartbeat monitor timed out! Process will be terminated after dumping"),
    ("log.gloo", "[rank1]: RuntimeError: Gloo connectFullMesh failed with [../gloo/transport/tcp/pair.cc:144]"),
    ("log.loopback", "[rank0]: RuntimeError: [../gloo/transport/tcp/pair.cc:534] closed by peer [127.0.1.1]:3"),
    ("log.ras-dead", "  1 job process is considered dead (unreachable via the RAS network)"),
    ("log.ras-missing", "  Missing communicator data from 1 job process"),
    ("log.ras-mismatch", "  Communicator ranks have different AllGather operation counts"),
    ("log.exception", "DistBackendError: NCCL error in: ../c10d/ProcessGroupNCCL.cpp:1691, unhandled system error"),
    ("log.exception", "ncclSystemError: System call (e.g. socket, malloc) or external library call failed."),
    ("log.exception", "Test NCCL failure all_reduce.cu:471 'internal error'"),
    ("log.heartbeat", "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting."),
    ("log.nvls-off", "Failed to bind NVLink SHARP (NVLS) Multicast memory of size 2 : CUDA error 401 'present state'."
     " Proceeding without NVLS support."),
    ("log.engine-wait", "(EngineCore_DP0 pid=7) INFO 10-22 09:43:49 [shm_broadcast.py:466] No available shared memory"
     " broadcast block found in 60 seconds. This typically happens when some processes are hanging."),
    ("log.engine-wait", "WARNING 08-13 11:31:37 shm_broadcast.py:386] No available block found in 60 second"),
    ("log.engine-timeout", "(EngineCore_DP0 pid=7) ERROR 10-22 [core.py:710] TimeoutError: RPC call to execute_model"
     " timed out."),
    ("log.engine-timeout", "[2026-02-22 08:19:45 TP3] Watchdog timeout (self.watchdog_timeout=300)"),
    ("log.worker-lost", "(raylet) A worker died or was killed while executing a task by an unexpected system error."),
    ("log.worker-lost", "ERROR 10-22 [multiproc_executor.py:140] Worker proc VllmWorker-0 died unexpectedly."),
    ("log.worker-lost", "ERROR 10-30 13:46 utils.py:120] Worker VllmWorkerProcess pid 68 died, exit code: -15"),
    ("log.xid", "Mar 17 04:11:02 n7 kernel: NVRM: Xid (PCI:0000:4e:00): 79, pid=1, GPU has fallen off the bus."),
    ("log.xid", "[ 812.1] NVRM: Xid (0000:4e:00): 94, Contained: SM (0x1)"),
    ("log.host-memory", "kernel: Memory cgroup out of memory: Killed process 4321 (python3) total-vm:9kB"),
    ("log.host-memory", "slurmstepd: error: Detected 1 oom_kill event in StepId=77.0. Some of the step tasks died"),
    ("log.host-memory", "    reason: OOMKilled"),
    ("log.host-memory", "ray: 1 Workers (tasks / actors) killed due to memory pressure (OOM), 0 crashed"),
    ("log.shm-small", "  traceback : Signal 7 (SIGBUS) received by PID 3"),
    ("log.rank-died", "[ERROR] failed (exitcode: -9) local_rank: 1 (pid: 120) of binary: /usr/bin/python3"),
    ("log.rank-died", "  traceback : Signal 9 (SIGKILL) received by PID 99"),
    ("log.rank-died", "mpirun noticed that process rank 3 on node n1 exited on signal 11 (Segmentation fault)."),
    ("log.rank-died", "srun: error: n1: task 3: Exited with exit code 137"),
    ("log.shm-small", "Fatal Python error: Bus error"),
    ("log.rank-died", "[gpu9:3326:0:3326] Caught signal 11 (Segmentation fault: address not mapped to object)"),
    ("log.rank-died", "2026-08-31 12:27:50 [n3:00956] Signal: Segmentation fault (11)"),
    ("log.rank-died", "Fatal Python error: Segmentation fault"),
    ("log.rank-died", "!!!!!!! Segfault encountered !!!!!!!"),
    ("log.rank-died", "*** SIGSEGV received at time=1736 on cpu 12 ***"),
    ("log.rank-died", "srun: error: n7: task 3: Segmentation fault (core dumped)"),
    ("log.rank-died", "/bin/bash: line 1:  4242 Killed                  python train.py"),
    ("log.fabric", "n1: Test CUDA failure common.cu:941 'system not yet initialized'"),
    ("log.fabric", "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"),
    ("log.cuda", "n1: Test CUDA failure common.cu:941 'invalid device ordinal'"),
    ("log.wrong-data", "# Out of bounds values : 24 FAILED"),
    ("log.cuda-memory", "[rank3]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
    ("log.cuda", "[E] [Rank 0] NCCL watchdog thread terminated with exception: CUDA error: an illegal memory access"),
    ("log.port-busy", "DistNetworkError: port: 29500, name: EADDRINUSE, message: address already in use"),
    ("log.rendezvous", "[rank1]: RuntimeError: [1] is setting up NCCL communicator and retrieving ncclUniqueId from [0]"
     " via c10d key-value store by key '0', but store->get('0') got error: Timeout waiting for key: default_pg/0/0"),
    ("log.rendezvous", "[c10d] The client socket has timed out after 300000ms while trying to connect to (n1, 29500)."),
    ("log.rendezvous", "torch.distributed.DistStoreError: Timed out after 61 seconds waiting for clients. 1/2 joined."),
    ("log.program", "[rank3]: ValueError: the batch is empty"),
    ("log.dup-gpu", "Duplicate GPU detected : rank 3 and rank 0 both on CUDA device f000"),
    ("log.ofi-rails", "NET/OFI Unexpected number of remote rails for dev 1. Expected 2 but got 3"),
    ("log.p2p-nvlink", "P2P is disabled between NVLINK connected GPUs 1 and 0. This should not be the case"),
]  # fmt: skip


@pytest.mark.parametrize(("id", "text"), SAMPLES)
def test_warning_is_found_under_its_row(id: str, text: str) -> None:
    finding = read(warn(text)).findings[0]
    assert (finding.id, finding.root_cause, finding.host) == (id, True, "n1")
    assert finding.evidence[0].line == 2
    assert text[:40] in finding.evidence[0].text
    assert finding.remedy


@pytest.mark.parametrize(("id", "text"), BARE)
def test_text_without_prefix(id: str, text: str) -> None:
    assert read(f"{text}\n").findings[0].id == id


@pytest.mark.parametrize(
    ("where", "id"),
    [("transport/nvls.cc:598", "log.nvls"), ("transport/p2p.cc:256", "log.p2p-denied"), ("a.cc:1", "log.cuda")],
)
def test_the_file_that_speaks_counts(where: str, id: str) -> None:
    assert read(warn("Cuda failure 1 'invalid argument'", where=where)).findings[0].id == id


def test_a_report_of_ras_names_the_process_that_is_gone() -> None:
    report = read(
        "NCCL version 2.27.3 compiled with CUDA 12.9\n\nErrors\n======\n\nDEAD\n"
        "  1 job process is considered dead (unreachable via the RAS network)\n"
        "  Process 3487984 on node 172.16.64.213 managing GPU 5\n\n"
        "#0-0 (cf264af53edbe986) INCOMPLETE\n  Missing communicator data from 1 rank\n"
    )
    assert (report.verdict, report.nccl_version) == ("fail", "2.27.3")
    assert [finding.id for finding in report.findings] == ["log.ras-dead", "log.ras-missing"]
    assert "process 3487984 on 172.16.64.213, GPU 5" in report.findings[0].title


def test_every_row_has_a_sample_and_a_topic() -> None:
    ids = {rule.id for rule in ERRORS}
    assert ids == {id for id, _ in (*SAMPLES, *BARE)}
    assert ids <= set(TOPICS)


@pytest.mark.parametrize(
    "text",
    [
        "NET/Plugin: Failed to find ncclCollNetPlugin_v10 symbol.",
        "NET/OFI Could not find ncclGetVersion symbol",
        "NET/OFI Failed to initialize GDRCopy: Failed to open gdr handle",
        "TUNER/Plugin: Could not find: libnccl-tuner.so. Using internal tuner plugin.",
        "NET/Plugin: Plugin load returned 2 : libnccl-net.so: cannot open shared object file: No such file",
        "Could not find real path of /sys/class/net/eth0/device",
        "[Service thread] Connection closed by localRank 3",
        "net.cc:79 -> 3",
        "include/net.h:24 -> 2",
        "misc/socket.cc:400 -> 7",
        "misc/socket.cc:829 -> 3",
        "comm 0x5 rank 0 nranks 2 cudaDev 0 busId 1b000 - Abort COMPLETE",
        "Call to connect returned Connection refused, retrying",
    ],
)
def test_harmless_records_are_no_failure(text: str) -> None:
    assert read(info(text)).verdict == "inconclusive"


@pytest.mark.parametrize(
    "text",
    [
        "NET/IB : Got async event : port active",
        "NET/IB : mlx5_0:1 Got non-fatal async event: client reregistration(17)",
        "NET/IB : mlx5_0:1 Got non-fatal async event: port active(9)",
        "Could not find a path for pattern 4",
        "Cannot get incoming CPU.",
        "NET/IB: Resiliency is enabled on a recv communicator (0x7f) with a single device. This does not make sense",
        "[Service thread] Accept failed Success",
    ],
)
def test_harmless_warnings_are_no_finding(text: str) -> None:
    assert read(warn(text)).verdict == "inconclusive"


@pytest.mark.parametrize("text", ["Connection refused by the database", "No route to host", "rank 3 aborted"])
def test_other_programs_errors_are_not_nccls(text: str) -> None:
    assert read(f"connect to 10.0.0.1<80>: {text}\n").verdict == "inconclusive"


def test_unknown_warning_is_shown_and_fails_only_with_a_trail() -> None:
    alone = read(warn("Something new happened"))
    assert (alone.verdict, alone.findings[0].id) == ("warn", "log.warn")
    followed = read(
        warn("Something new happened") + info("init.cc:1358 -> 3") + info("group.cc:64 -> 3 [Async thread]")
    )
    assert followed.verdict == "fail"
    assert (followed.findings[0].id, followed.findings[0].root_cause) == ("log.warn", True)


def test_a_killed_rank_explains_the_hang_of_the_others() -> None:
    killed = "[ERROR] failed (exitcode: -9) local_rank: 1 (pid: 120) of binary: /usr/bin/python3\n"
    report = read(BARE[0][1] + "\n" + killed + warn("socketProgress: Connection closed by remote peer n2<41000>"))
    assert (report.verdict, report.findings[0].id) == ("fail", "log.rank-died")
    assert "signal 9, local rank 1" in report.findings[0].title


@pytest.mark.parametrize("code", [13, 31, 43, 45])
def test_xid_of_the_program_is_no_fault_of_the_gpu(code: int) -> None:
    assert read(f"NVRM: Xid (PCI:0000:4e:00): {code}, pid=1\n").verdict == "inconclusive"


@pytest.mark.parametrize(
    ("text", "where", "remedy"),
    [
        ("Cuda failure 'CUDA driver version is insufficient for CUDA runtime'", "init.cc:1582", "driver is older"),
        ("Cuda failure 'named symbol not found'", "enqueue.cc:58", "not built for this GPU"),
        ("Cuda failure 'CUDA driver is a stub library'", "misc/cudawrap.cc:70", "LD_LIBRARY_PATH"),
        ("Cuda failure 700 'an illegal memory access was encountered'", "enqueue.cc:1556", "CUDA_LAUNCH_BLOCKING=1"),
        ("Cuda failure 217 'peer access is not supported between these two devices'", "transport/shm.cc:590",
         "NCCL_CUMEM_HOST_ENABLE=0"),
        ("Call to ibv_reg_dmabuf_mr failed with error Operation not supported", "misc/ibvwrap.cc:288",
         "NCCL_DMABUF_ENABLE=0"),
    ],
)  # fmt: skip
def test_the_first_line_to_type_is_of_what_was_said(text: str, where: str, remedy: str) -> None:
    assert remedy in read(warn(text, where=where)).findings[0].remedy.splitlines()[0]


def test_who_spoke_instead_of_a_rank_is_quoted() -> None:
    finding = read(warn("socketFinalizeAccept: wrong magic 74656d2f20544547 != 7970663b906d70b9")).findings[0]
    assert "it says 'GET /met'" in finding.title
    assert "scanners" in finding.remedy.splitlines()[0]
    assert "says" not in read(warn("socketFinalizeAccept: wrong magic 8a656d2f20544547 != 79")).findings[0].title


def test_two_hosts_with_one_address_of_a_container_bridge() -> None:
    boot = "Bootstrap : Using eth0:172.17.0.2<0>"
    refused = warn("socketStartConnect: Connect to 172.17.0.2<40001> failed : Connection refused", "n2")
    report = read(info(boot, "n1") + info(boot, "n2") + refused)
    assert (report.verdict, report.findings[0].id) == ("fail", "log.docker-bridge")


@pytest.mark.parametrize("peer", ["128::1d<40861>", "node-a<41000>", "10.0.0.5<5>"])
def test_the_peer_is_named_whole(peer: str) -> None:
    text = f"socketPollConnect: Connect to {peer} returned 113(No route to host) errno 115"
    assert f"no route to {peer} (on n1)" == read(warn(text)).findings[0].title


def test_link_local_gids_name_the_port_without_an_address() -> None:
    gids = "localGid fe80::4a21:1 remoteGids fe80::4a21:9 hca roceP2p1s0f0"
    finding = read(warn(f"{COMPLETION}status=IBV_WC_RETRY_EXC_ERR(12) opcode=IBV_WC_SEND(0) {gids}")).findings[0]
    assert finding.remedy.startswith("export NCCL_IB_HCA=^=roceP2p1s0f0 ")
    assert "ib_write_bw -d roceP2p1s0f0" in finding.remedy


@pytest.mark.parametrize(
    "text",
    [
        "[W225 socket.cpp:767] [c10d] The client socket cannot be initialized to connect to [::ffff:10.9.1.4]:5000"
        " (errno: 97 - Address family not supported by protocol).",
        "[W225 socket.cpp:697] [c10d] The client socket has failed to connect to [n1]:29500 (errno: 111 - Connection"
        " refused).",
        "[Gloo] Rank 9 is connected to 15 peer ranks. Expected number of connected peer ranks is : 15",
    ],
)
def test_what_torch_says_on_its_way_is_no_failure(text: str) -> None:
    assert read(f"{text}\n").verdict == "inconclusive"


@pytest.mark.parametrize(
    "text",
    [
        "if you see CUDA error: out of memory then lower --gpu-memory-utilization",
        "If you get RuntimeError: CUDA error: an illegal memory access was encountered, set CUDA_LAUNCH_BLOCKING=1",
        "# CUDA error: invalid argument: an old driver",
        "// CUDA error: invalid device ordinal",
        "- CUDA error: out of memory",
        "### CUDA error: out of memory",
        "| CUDA error: out of memory | lower it |",
        "| `CUDA error: out of memory` | lower it |",
        "1. CUDA error: no kernel image is available for execution on the device",
        "**CUDA error: out of memory** on one worker",
        "CUDA error: no kernel image means that your GPU is too new",
        "RuntimeError: CUDA error: out of memory means you have too little",
        "[Bug]: CUDA error: an illegal memory access was encountered",
        "Symptom: CUDA error: out of memory",
        "I ran it on 8 GPUs and got CUDA error: an illegal memory access was encountered",
        '    raise RuntimeError("CUDA error: out of memory")',
        "2024: we saw CUDA error: out of memory often",
        "INFO 10-22 [a.py:1] if you see CUDA error: system not yet initialized, start the fabric manager",
        "with torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB, try a smaller batch",
        "| #19204 | `Call to bind failed: Address already in use` and P2P switched off |",
        "HIP error: you may see this where the GPU is not supported",
        "'No available shared memory broadcast block found in 60 seconds' is normal while it compiles",
        "The line No available block found in 60 second is harmless",
        "DEBUG 06-05 [shm_broadcast.py:313] No available shared memory broadcast block found in 60 second.",
        "In the docs: TimeoutError: RPC call to execute_model timed out",
    ],
)
def test_who_speaks_of_an_error_reports_none(text: str) -> None:
    assert read(f"{text}\n").verdict == "inconclusive"


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: the launch timed out and was terminated",
        "RuntimeError: CUDA error: no kernel image is available for execution on the device",
        "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
        "  what():  CUDA error: an illegal memory access was encountered",
        "[rank3]: RuntimeError: CUDA error: device-side assert triggered",
        "[rank1]:[E304 12:54:52.1 ProcessGroupNCCL.cpp:1414] [PG 0 Rank 1] Process group watchdog thread ended with"
        " exception: CUDA error: an illegal memory access was encountered",
        "(Worker_TP0 pid=514) ERROR 10-27 13:45:16 [core.py:710] RuntimeError: CUDA error: unspecified launch failure",
        "2025-03-21 17:07:30,745 - trainers - ERROR - RuntimeError: CUDA error: invalid device ordinal",
        "2024-10-14 01:39:49 | ERROR | stderr | [rank0]: RuntimeError: CUDA error: invalid device ordinal",
        "[1,3]<stderr>:RuntimeError: CUDA error: invalid device ordinal",
        "worker-0: RuntimeError: CUDA error: invalid device ordinal",
        "worker-0 | RuntimeError: CUDA error: invalid device ordinal",
        '{"log":"RuntimeError: CUDA error: unknown error\\nCUDA kernel errors might be reported elsewhere"}',
        "2026-01-01T00:00:00.1Z RuntimeError: HIP error: invalid device function",
        "E   RuntimeError: CUDA error: unspecified launch failure",
        "[2026-01-01 10:00:00 TP3] Scheduler hit an exception: RuntimeError: CUDA error: unspecified launch failure",
        "engine.cu:96: CUDA error: unspecified launch failure",
        "```RuntimeError: CUDA error: unspecified launch failure",
    ],
)
def test_a_line_that_reports_an_error_of_cuda(text: str) -> None:
    report = read(f"{text}\n")
    assert (report.verdict, report.findings[0].id, report.findings[0].root_cause) == ("fail", "log.cuda", True)


@pytest.mark.parametrize(
    "unit", ["12:12:", "1-", "a.b:1 ", "[1]", "E ", "2025-03-", "a.", "Error: ", '{"msg', "x-1 | "]
)
def test_a_long_line_that_almost_is_a_head_takes_no_time(unit: str) -> None:
    start = time.process_time()
    read((unit * 2000)[:2000] + "! CUDA error: out of memory\n")
    assert time.process_time() - start < 1


BIND = "Failed to bind NVLink SHARP (NVLS) Multicast memory of size 2097152 : CUDA error 401 'present state'."
INIT = "ncclCommInitRank comm 0x5 rank 0 nranks 8 cudaDev 0 nvmlDev 0 busId 1c000 commId 0x65 - Init COMPLETE"
CUDA_IN_NVLS = warn("Cuda failure 1 'invalid argument'", where="transport/nvls.cc:598")


@pytest.mark.parametrize(
    ("log", "verdict", "finding"),
    [
        (info(f"{BIND} Proceeding without NVLS support."), "warn", "log.nvls-off"),
        (f"{BIND} Proceeding without NVLS support.\n", "warn", "log.nvls-off"),
        (info("NVLS multicast failed, falling back to Ring"), "warn", "log.nvls-off"),
        (warn(BIND), "fail", "log.nvls"),
        (f"{BIND}\n", "fail", "log.nvls"),
        (CUDA_IN_NVLS + info("transport/nvls.cc:598 -> 1") + info(INIT), "warn", "log.nvls-off"),
        (CUDA_IN_NVLS + "# Avg bus bandwidth    : 330.1\n", "warn", "log.nvls-off"),
        (CUDA_IN_NVLS + info("rank 0 failed to NVLS register sendbuff 0x5 sendbuffSize 8"), "warn", "log.nvls-off"),
        (info(INIT) + CUDA_IN_NVLS, "fail", "log.nvls"),
        (CUDA_IN_NVLS + info(INIT, pid=99), "fail", "log.nvls"),
        (CUDA_IN_NVLS + info("init.cc:1277 -> 1") + info(INIT), "fail", "log.nvls"),
        (CUDA_IN_NVLS + info("transport/nvls.cc:330 -> 1"), "fail", "log.nvls"),
        (CUDA_IN_NVLS + info(INIT) + "ncclUnhandledCudaError: Call to CUDA function failed.\n", "fail", "log.nvls"),
    ],
)
def test_a_failure_of_nvls_counts_as_what_became_of_the_run(log: str, verdict: str, finding: str) -> None:
    report = read(log)
    assert (report.verdict, report.findings[0].id) == (verdict, finding)
    assert "fabric" in report.findings[0].remedy
    assert ("slower" in report.findings[0].title) == (verdict == "warn")


def test_nvls_that_was_done_without_is_not_the_cause_of_a_later_failure() -> None:
    report = read(CUDA_IN_NVLS + info(INIT) + warn(f"{COMPLETION}status=12 opcode=1") + info("transport/net.cc:1 -> 6"))
    assert [(finding.id, finding.root_cause) for finding in report.findings] == [
        ("log.ib-timeout", True),
        ("log.nvls-off", False),
    ]


def test_a_trail_through_nvls_alone_is_a_failure_whose_cause_is_not_shown() -> None:
    assert [finding.id for finding in read(info("transport/nvls.cc:330 -> 1")).findings] == ["log.trail"]
    both = read(info("transport/nvls.cc:330 -> 1") + info("init.cc:1277 -> 1"))
    assert [finding.id for finding in both.findings] == ["log.trail"]


WAIT = "(EngineCore_DP0 pid=7) INFO 10-22 09:43:49 [shm_broadcast.py:466] No available block found in 60 seconds.\n"
WORKS = "INFO: Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 12.5 tokens/s, Running: 1 reqs\n"


@pytest.mark.parametrize(
    ("log", "verdict"),
    [
        (WAIT, "warn"),
        (WAIT * 9, "warn"),
        (WAIT * 10, "fail"),
        (WAIT * 9 + WORKS + WAIT * 9, "warn"),
        (WAIT * 9 + WORKS.replace("12.5", "0.0") + WAIT, "fail"),
        (WORKS.replace("12.5", "0.0") + WAIT * 9 + WORKS + WAIT, "warn"),
        (WAIT * 20 + "INFO:     Application startup complete.\n", "warn"),
        ((WAIT + WAIT.replace("pid=7", "pid=8")) * 6, "warn"),
    ],
)
def test_an_engine_that_waits_has_failed_when_nothing_works_any_more(log: str, verdict: str) -> None:
    report = read(log)
    assert (report.verdict, report.findings[0].id) == (verdict, "log.engine-wait")
    assert "EngineCore_DP0 pid=7" in report.findings[0].title


def test_what_made_the_engine_wait_is_the_cause() -> None:
    report = read(
        WAIT * 3 + warn(f"{COMPLETION}status=12 opcode=1") + "TimeoutError: RPC call to sample_tokens timed out\n"
    )
    assert [finding.id for finding in report.findings] == ["log.ib-timeout", "log.engine-timeout", "log.engine-wait"]


def test_the_port_of_ras_is_not_one_that_the_job_needs() -> None:
    taken = "Call to bind failed: Address already in use"
    assert read(warn(taken, where="ras/client_support.cc:160")).verdict == "inconclusive"
    assert read(warn(taken)).findings[0].id == "log.port-busy"


def test_advice_about_memory_is_no_error() -> None:
    assert read("INFO if you see CUDA out of memory, lower --gpu-memory-utilization\n").verdict == "inconclusive"


def test_quotes_stay_in_pairs() -> None:
    assert "999 'unknown error'" in read(warn("Cuda failure 999 'unknown error'")).findings[0].title


def test_trail_without_a_cause() -> None:
    report = read(info("init.cc:1358 -> 3") + info("group.cc:64 -> 3 [Async thread]"))
    assert (report.verdict, report.findings[0].id) == ("fail", "log.trail")
    assert "not in this log" in report.findings[0].title


def test_last_error_of_pytorch_is_read_without_prefix() -> None:
    text = "[rank0]: Last error:\n[rank0]: Net : Connect to 10.0.0.5<5> failed : Connection timed out\n"
    finding = read(f"ncclSystemError: System call failed\n{text}").findings[0]
    assert (finding.id, finding.root_cause, finding.evidence[0].line) == ("log.tcp-timeout", True, 3)


def test_floods_are_bounded() -> None:
    facts = scan(warn(f"{COMPLETION}status=12 opcode=1") * 20_000)
    (note,) = facts.all_notes("log.ib-timeout")
    assert 1000 < note.count <= 20_000


def test_an_error_that_torch_quotes_counts_once() -> None:
    report = read("ncclInvalidUsage: invalid usage.\nLast error:\nDuplicate GPU detected : rank 1 and rank 0\n")
    assert (report.findings[0].id, "times" in report.findings[0].title) == ("log.dup-gpu", False)


@pytest.mark.parametrize(
    "text",
    ["# Out of bounds values : 0 OK", "n1: Process 12 was Killed by the user", "[n1:12] Signal: Aborted (6)"],
)
def test_other_words_of_programs_are_no_failure(text: str) -> None:
    assert read(text + "\n").verdict == "inconclusive"


def test_a_queue_pair_with_an_ipv4_gid_is_not_told_to_choose_one() -> None:
    text = "Call to ibv_modify_qp failed with 110 Connection timed out, on dev mlx5_3:1, local GID index 3, local GID "
    advice = [read(warn(text + gid)).findings[0].remedy for gid in ("::ffff:10.1.3.5", "fe80::1")]
    assert ["GID_INDEX" in remedy for remedy in advice] == [False, True]
    assert all("NCCL_CROSS_NIC=0" in remedy for remedy in advice)
