"""What failing ranks say: one row a wording, from the most telling to the most general, with what it means."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.nccl_log.error_rule import Tier
from aphro_core.doctor.nccl_log.error_rule import rule as _rule
from aphro_core.doctor.nccl_log.program_errors import PROGRAM_ERRORS

_CAUSE, _WEAK, _SUSPECT, _SYMPTOM, _CONSEQUENCE, _TRAIL, _NOTE = Tier
_PEER = r"(?:.*?\bpeer (?P<peer>[^\s<]+))?"
_COMPLETION = r"Got completion" + _PEER + r".*?(?:error|status=?) ?(?:(?P<name>IBV_WC_\w+) ?\(?)?"
_CONNECT = r"(?:connect\w*\b|Net ?:|Call to \w+|bootstrap)"
_TO = r"(?:.*?\bto (?P<peer>[\w.:%-]+<\d+>|[\w.:%-]*[\d:]))?"
_CUDA = r"(?:Cuda|HIP) failure:?"
_MEMORY = r"(?:Cannot allocate memory|ENOMEM|\(12\))"

ERRORS: Final = (
    *PROGRAM_ERRORS,
    # programs and placement
    _rule("log.dup-gpu", _CAUSE, r"Duplicate GPU detected ?:? ?(?P<who>rank \d+ and rank \d+ both on CUDA device \w+)?"
          r"|Multiple Ranks are using the same GPU", "two ranks use the same GPU: {who}"),
    _rule("log.mismatch", _CAUSE, r"Mismatched collective|collective mismatch error",
          "ranks call different collectives, or with different sizes"),
    _rule("log.version", _CAUSE, r"Mismatched NCCL version|NCCL version mismatch|different NCCL versions",
          "ranks run different NCCL versions"),
    _rule("log.rank-count", _CAUSE, r"mismatch in rank count|rank \d+ of \d+ ranks has already checked in"
          r"|Invalid rank requested", "ranks disagree about how many they are"),
    _rule("log.port-busy", _CAUSE, r"Address already in use", "a port that NCCL must listen on is taken"),
    _rule("log.nofile", _CAUSE, r"Too many open files", "the limit on open files is reached"),
    # shared memory
    _rule("log.shm-small", _CAUSE, r"(?:failed to extend|creating shared memory segment|posix_fallocate|ftruncate"
          r"|/dev/shm).*No space left on device|failed to extend (?P<what>/dev/shm/nccl-\S+)"
          r"|posix_fallocate failed|creating shared memory segment", "/dev/shm is full or too small"),
    _rule("log.shm-gone", _CAUSE, r"attaching to shared memory segment|unlink shared memory|shm_open failed"
          r"|unable to open shared memory|/dev/shm/nccl-\S+.*No such file|Call to open failed: No such file",
          "a shared memory segment of another rank is not there: ranks of one host do not share one /dev/shm"),
    # InfiniBand and RoCE
    _rule("log.ib-timeout", _CAUSE, _COMPLETION + r"12\b",
          "the NIC of {peer} does not answer: completion status 12, retries exceeded"),
    _rule("log.ib-protection", _CAUSE, _COMPLETION + r"(?:4|10)\b",
          "the NIC may not touch the GPU's buffer: completion with a protection or access error"),
    _rule("log.ib-flush", _CONSEQUENCE, _COMPLETION + r"5\b", "requests were flushed after an earlier error"),
    _rule("log.ib-flush", _CONSEQUENCE, r"communicator encountered a fatal error \(detected in ncclIb",
          "a NIC had failed before"),
    _rule("log.ib-rnr", _WEAK, _COMPLETION + r"13\b", "the receiver {peer} is not ready: stalled or dead"),
    _rule("log.ib-completion", _CAUSE, _COMPLETION + r"(?P<status>\d+)",
          "a work request failed with completion status {status}"),
    _rule("log.ib-timeout", _CAUSE, r"IBV_WC_RETRY_EXC_ERR|transport retry counter exceeded",
          "the NIC of the peer does not answer: retries exceeded"),
    _rule("log.ib-event", _CAUSE, r"(?:Got (?:non-fatal )?async|port) event ?: ?"
          r"(?P<event>(?:port|local|device|QP)[\w ]*)"
          r"|(?:Got )?async fatal event(?: on [CQS]\w+ ?\([^)]*\))? ?: ?(?P<fatal>[\w ]*)",
          "the NIC reported an event: {event}{fatal}"),
    _rule("log.ib-nomem", _CAUSE, r"ibv_(?:exp_)?(?:reg_|create_|alloc_)\w+.*" + _MEMORY
          + r"|(?:register|registration|reg_?mr).*(?:Cannot allocate memory)",
          "the NIC's memory could not be pinned: the locked-memory limit"),
    _rule("log.ib-nomem", _CAUSE, r"Call to ibv_create_[cq][qp] failed\s*$",
          "the NIC's queues could not be made; this NCCL does not say why, most often it is the locked-memory limit"),
    _rule("log.ib-register", _CAUSE, r"ibv_(?:exp_)?reg_\w+.*(?:failed|error)"
          r"|NET/OFI.*(?:nable to|ould not) register memory"
          r"|dmabuf.*(?:failed|error)", "the NIC cannot register this memory: GPU memory is not open to it"),
    _rule("log.ib-mixed", _CAUSE, r"incompatible devices|is incompatible with the local",
          "an InfiniBand port met a RoCE port"),
    _rule("log.ib-rail", _CAUSE, r"ibv_modify_qp.*(?:timed out|\(?110\b)",
          "the two NICs cannot reach each other: the queue pair's connection timed out"),
    _rule("log.ib-unreachable", _CAUSE, r"ibv_modify_qp.*(?:unreachable|\(?101\b|No route|\(?113\b)",
          "the NIC's port has no address or route towards the peer's"),
    _rule("log.ib-gid", _CAUSE, r"ibv_modify_qp.*(?:Invalid argument|\b22\b|No such device|\b19\b|failed)"
          r"|ibv_query_gid.*failed|No such GID|read failed in ncclIbRoce|RoCE.*GID.*(?:failed|not found)",
          "the GID index does not exist on this port, or is of another type"),
    _rule("log.ib-open", _CAUSE, r"(?:NET/IB|ibv_).*(?:nable to open device|could not open|open_device failed)"
          r"|ibv_open_device.*(?:failed|error)|Unable to open device (?:mlx|rocep|irdma|bnxt|efa)\w*",
          "a verbs device could not be opened"),
    _rule("log.ib-call", _CAUSE, r"Call to (?P<call>ibv_\w+|wrap_ibv_\w+) failed(?: with error)? ?(?P<why>[^,]*)",
          "a verbs call failed: {call}: {why}"),
    _rule("log.ib-warn", _SUSPECT, r"NET/IB\w* ?: ?(?P<why>.*(?:fail|error|unable|could ?n[o']t|invalid).*)",
          "the InfiniBand transport warns: {why}"),
    _rule("log.nic-count", _CAUSE, r"Detected mixed local Net device counts",
          "ranks see different numbers of NICs"),
    # plug-ins
    _rule("log.ofi-rails", _CAUSE, r"Unexpected number of remote rails.*Expected \d+ but got \d+|remote rails",
          "nodes expose different numbers of EFA devices"),
    _rule("log.ofi-peer", _CAUSE, r"Unresponsive receiver|Unreachable remote|nable to insert remote address"
          r"|NET/OFI.*completed with error"
          r".*(?:timed? ?out|4126|4118|handshake)",
          "the peer does not answer over EFA: gone, or its traffic is filtered"),
    _rule("log.ofi-error", _CAUSE, r"NET/OFI.*completed with error.*?Error: (?:\d+ \()?(?P<why>[^).]*)",
          "a request over libfabric failed: {why}"),
    _rule("log.net-name", _CAUSE, r"Error: network (?P<name>.*?) not found",
          "NCCL_NET names a network that is not there: {name}"),
    _rule("log.no-plugin-start", _SUSPECT, r"fi_getinfo\(\) call failed|aws-ofi-nccl initialization failed"
          r"|NET/OFI (?:Failed to initialize|Initializing plugin failed)|No eligible providers"
          r"|Unable to find libfabric provider|Could not find any optimal provider|Plug-in core initialization failed",
          "the network plug-in could not start"),
    _rule("log.no-network", _CAUSE, r"Failed to initialize any NET plugin", "no network could be started"),
    _rule("log.ofi-warn", _SUSPECT, r"NET/OFI (?P<why>.*(?:fail|error|unable|could ?n[o']t|supported).*)",
          "the libfabric plug-in warns: {why}"),
    _rule("log.provider-timeout", _SUSPECT,
          r"(?P<who>[\d.]+(?:<\d+>)?<-[\d.]+(?:<\d+>)?)? ?(?:[rt]x ){1,2}ctrl timeout",
          "the provider's TCP waits for its peer: {who}"),
    # sockets
    _rule("log.no-interface", _CAUSE, r"no socket interface found|NET/Socket ?: no interface found"
          r"|No network interface|with family \d+ is neither AF_INET", "no network interface matches"),
    # torch's "errno: 97 - Address ..." is a warning: it goes on with IPv4
    _rule("log.family", _CAUSE, r"(?<!errno: 97 - )Address family not supported",
          "one side advertises an IPv6 address, the other has none"),
    _rule("log.wrong-peer", _CAUSE, r"wrong type \d+|wrong magic(?: (?P<magic>[0-9a-f]{16})\b)?",
          "a connection was answered by the wrong listener{magic}"),
    _rule("log.wrong-peer", _CAUSE, r"message truncated ?:? ?(?P<why>receiv.*)",
          "a message has another size than expected: ranks differ in calls, sizes, settings or version: {why}"),
    # a connection that was there
    _rule("log.heartbeat", _CONSEQUENCE,
          r"Call to (?:send|recv)\b" + _TO + r".*(?:Connection reset by peer|Broken pipe)",
          "another rank ended: {peer} closed the connection"),
    _rule("log.loopback", _CAUSE, _CONNECT + r".*?\bto (?P<peer>127\.[\d.]+(?:<\d+>)?)",
          "a rank was told to connect to {peer}, which is itself", is_general=True),
    _rule("log.link-local", _CAUSE, _CONNECT + r".*?\bto (?P<peer>(?:fe80:[\w:%.-]*[\w]|169\.254\.[\d.]+)(?:<\d+>)?)",
          "a rank was told to connect to {peer}, a link-local address", is_general=True),
    _rule("log.no-route", _CAUSE, _CONNECT + _TO + r".*(?:No route to host|Network is unreachable|\b113\(|\b101\()",
          "no route to {peer}", is_general=True),
    _rule("log.tcp-timeout", _CAUSE, _CONNECT + _TO + r".*(?:timed out|\b110\()",
          "TCP packets to {peer} are lost", is_general=True),
    _rule("log.tcp-timeout", _CAUSE, r"socket\.(?:cc|h):\d+ -> \d+ \(Operation now in progress\)|no POLLOUT events",
          "a TCP connection between ranks is never answered", in_info=True),
    _rule("log.refused", _WEAK, _CONNECT + _TO + r".*(?:Connection refused|\b111\()",
          "nobody listens at {peer}", is_general=True),
    _rule("log.dns", _CAUSE, r"getaddrinfo.*(?:Name or service not known|failure in name)", "a host name is not known"),
    _rule("log.connect", _WEAK, _CONNECT + _TO + r".*(?:failed|returned) ?:? ?(?P<why>.*)",
          "the connection to {peer} fails: {why}", is_general=True, where="socket"),
    _rule("log.connect", _WEAK, r"Failed to execute operation Connect from rank \d+, retcode 2",
          "a rank could not connect to another; this NCCL does not say why"),
    # GPUs
    _rule("log.p2p-nvlink", _CAUSE, r"P2P is disabled between NVLINK connected GPUs (?P<who>\d+ and \d+)?",
          "NVLink connects GPUs {who}, yet P2P does not work between them", in_info=True),
    _rule("log.nvlink-down", _SUSPECT, r"(?P<who>rank \d+ busId \w+) has no active NVLinks",
          "a GPU of an NVLink machine has no active link: {who}"),
    _rule("log.p2p-pcie", _NOTE, r"P2P is disabled between connected GPUs (?P<who>\d+ and \d+)?",
          "no P2P between GPUs on PCIe (such as {who}): host memory is used instead", in_info=True),
    _rule("log.peer-map", _CAUSE, r"peer mapping resources exhausted", "one process maps more than 8 peer GPUs"),
    _rule("log.p2p-denied", _CAUSE, r"failed to open CUDA IPC handle|peer access is not supported|Cuda failure 217\b"
          r"|failed to peer with device|Ipc(?:Get|Open)MemHandle|Failed to import .*handle",
          "P2P between GPUs was chosen, but the driver does not allow it"),
    _rule("log.nvls-off", _NOTE,
          r"Failed to bind NVLink SHARP(?:.*?CUDA error (?P<why>\d+ '[^']*'))?.*Proceeding without",
          "NCCL goes on without NVLink SHARP (NVLS), which could not be set up: {why}", in_info=True),
    _rule("log.nvls-off", _NOTE, r"NVLS.*(?:proceeding without|going on without|fall(?:s|ing)? back)",
          "NCCL goes on without NVLink SHARP (NVLS)", in_info=True, is_general=True),
    _rule("log.nvls", _CAUSE, r"Failed to bind NVLink SHARP(?:.*CUDA error (?P<why>\d+ '[^']*'))?",
          "NVLink SHARP (NVLS) could not be set up: {why}"),
    _rule("log.nvls", _CAUSE, r"NVLS.*(?:Multicast|bind).*(?:fail|error)", "NVLink SHARP (NVLS) could not be set up",
          is_general=True),
    _rule("log.imex", _CAUSE, r"MNNVL \(cliqueSize \d+\) is available but not|IMEX", "the IMEX service is not usable"),
    _rule("log.imex", _CAUSE, r"MNNVL is not supported on this system",
          "NVLink across hosts was asked for (NCCL_MNNVL_ENABLE=1), and this system has none"),
    _rule("log.fabric", _CAUSE, _CUDA + r".*(?:system not yet initialized|\b802\b)",
          "the NVSwitch fabric is not initialised"),
    _rule("log.cuda-memory", _CAUSE, _CUDA + r".*out of memory|Failed to (?:CUDA|HIP)? ?\w*alloc.*bytes",
          "a GPU ran out of memory"),
    _rule("log.nvls", _CAUSE, _CUDA + r" ?(?P<why>.*)", "NVLink SHARP (NVLS) could not be set up: {why}", where="nvls"),
    _rule("log.p2p-denied", _CAUSE, _CUDA + r" ?(?P<why>.*)", "P2P between GPUs failed: {why}", where="transport/p2p"),
    _rule("log.cuda", _CAUSE, _CUDA + r" ?(?P<why>.*)", "a CUDA call failed: {why}", in_prose=True),
    _rule("log.no-libcuda", _SUSPECT, r"Failed to find CUDA library (?P<name>\S*)",
          "the driver's library is not found: {name}"),
    _rule("log.nvml", _CAUSE, r"nvml\w*(?:\(\))? failed ?:? ?(?P<why>.*)",
          "the driver's management library failed: {why}"),
    _rule("log.topology", _CAUSE, r"Could not find (?:NET|GPU|node|device) .*|Failed to find reverse path"
          r"|Attribute \w+ of node \w+ not found"
          r"|XML .*(?:not found|error|mismatch)|too many XML nodes|parse .*topology|Error.*topo\w* file",
          "NCCL cannot make out the machine's topology"),
    # what others see
    _rule("log.watchdog", _SYMPTOM, r"Watchdog caught collective operation timeout: (?:WorkNCCL\((?P<work>[^)]*\)=?\d*)"
          r"|WorkNCCL)?|NCCL operations? (?:have|has) failed or timed out|Collective operation timeout"
          r"|ProcessGroupNCCL watchdog hang|watchdog got stuck|"
          r"Heartbeat monitor timed out! Process|dump signal due to a collective timeout",
          "a collective hung until PyTorch gave up: {work}"),
    _rule("log.ras-dead", _SYMPTOM, r"job process(?:es)? (?:is|are) considered dead",
          "NCCL's RAS counts processes of the job as dead"),
    _rule("log.ras-missing", _SYMPTOM, r"Missing communicator data from \d+ (?:job process|rank)",
          "processes of the job do not answer NCCL's RAS"),
    _rule("log.ras-mismatch", _NOTE, r"Communicator ranks have different (?P<operation>(?:\w+ )?operation) counts",
          "ranks of one communicator stand at different {operation} counts"),
    _rule("log.heartbeat", _CONSEQUENCE, r"ncclRemoteError|remote process exited or there was a network error",
          "another rank ended, or the network to it failed"),
    _rule("log.heartbeat", _CONSEQUENCE, r"Connection closed by (?:remote )?peer|Socket recv failed|\[Service thread\]"
          r"|\[Proxy Service|Proxy Call to rank|Connection reset by peer|Broken pipe|remote process exited"
          r"|Aborted|aborted", "another rank ended", is_general=True),
    _rule("log.exception", _CONSEQUENCE, r"NCCL error in: [^,]*(?:, (?P<why>[^,(]*))?|(?P<class>nccl(?:System|Internal|"
          r"UnhandledCuda|InvalidUsage|InvalidArgument|Remote)Error): (?P<what>.*)|Test NCCL failure (?P<test>.*)"
          r"|NCCL [Ee]rror:? (?P<code>[^{]*)$", "NCCL returned an error: {why}{class}{test}{code}"),
    # host tuning that RCCL asks for
    _rule("log.numa", _NOTE, r"NUMA auto balancing enabled|Missing \"?iommu=pt",
          "the host is not tuned as RCCL asks for"),
)  # fmt: skip
