"""What the findings on errors of processes and GPUs mean, and what to type."""

from __future__ import annotations

from typing import Final

TEXT: Final = """
log.dup-gpu
Two ranks of one host use the same GPU: the launcher starts more processes than there are GPUs, the local rank is not
used to choose the device, or CUDA_VISIBLE_DEVICES hides the other GPUs.
> torchrun --nproc_per_node=NUMBER_OF_GPUS ...   # one process a GPU; in Slurm one launcher a node: --ntasks-per-node=1
> # in the program: torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
> echo $CUDA_VISIBLE_DEVICES   # per rank; containers: --gpus all

log.mismatch
Ranks do not issue the same collectives in the same order with the same sizes: a fault of the program.
> export TORCH_DISTRIBUTED_DEBUG=DETAIL   # PyTorch then names the first difference

log.rank-count
Processes disagree about the number of ranks, or a rank joined twice: two jobs share one rendezvous, or a launcher was
started with another size.
> # a fresh rendezvous id and port for each job; the same world size everywhere

log.xid
The kernel's log names a fault of a GPU, its board or its link (Xid 79: fallen off the bus; 48, 94, 95: memory; 74:
NVLink; 119, 120: its processor does not answer). What NCCL says afterwards follows from it.
> nvidia-smi -q -d ECC,ROW_REMAPPER; sudo dmesg | grep Xid   # reset the GPU or reboot; repair it if this returns

log.host-memory
The host, its container or its job ran out of memory, and the kernel killed a process. The other ranks then lose their
connections or wait until they time out.
> sudo dmesg | grep -i -e oom -e 'killed process'; free -g   # who took it
> # more memory for the container or job (limits.memory, --mem), or fewer loader processes and pinned buffers

log.rank-died
A process of the job was killed (9: mostly for lack of host memory) or crashed (11, 4). The other ranks then lose their
connections or wait until they time out.
> sudo dmesg | grep -i -e oom -e 'killed process' -e segfault   # on the host of that process, at that time
> # its own log, just before the end

log.wrong-data
The collective ended, and its result is wrong. Mostly P2P over PCIe through an IOMMU or ACS, else a faulty link or GPU.
> export NCCL_P2P_DISABLE=1   # to compare; the same with NCCL_NVLS_ENABLE=0, NCCL_NET_GDR_LEVEL=LOC, and fewer GPUs
> sudo lspci -vvv | grep ACSCtl   # with SrcValid+: switch ACS off; in a virtual machine ATS has to be on

log.rendezvous
Ranks did not all come to the rendezvous in time: one ended before, or waits for something else, or the address or port
of the first one cannot be reached.
> nc -vz $MASTER_ADDR $MASTER_PORT   # from the ranks that wait, while rank 0 runs; a firewall, or another interface
> # the log of the ranks that are missing (key default_pg/0/0: rank 0): their first error is the cause

log.gloo
Gloo, which carries what ranks say on CPUs, could not connect them: it takes the interface that the host's own name
leads to, which may be another one than NCCL's.
> getent hosts $(hostname); ip route get PEER   # the name must lead to the address that the peers reach
> export GLOO_SOCKET_IFNAME=eth0   # that interface, on every node

log.program
A rank's own program ended with an exception, and not NCCL's. The other ranks then lose their connections or wait.
> # the traceback above that line

log.nofile
NCCL opens many sockets a peer.
> ulimit -n 1048576   # and nofile in /etc/security/limits.conf

log.shm-small
NCCL needs about 10 MB of /dev/shm a channel pair; containers get 64 MB unless told otherwise.
> docker run --shm-size=16g ...   # or --ipc=host
> # Kubernetes: an emptyDir with medium: Memory mounted at /dev/shm
> df -h /dev/shm; ls -l /dev/shm/nccl-*

log.shm-gone
A segment that one rank made is not visible to another of the same host: separate containers, an earlier failure of
that rank, or systemd removed it at logout.
> docker run --ipc=host ...   # all ranks of a host in one IPC namespace with one /dev/shm
> grep RemoveIPC /etc/systemd/logind.conf   # must be: RemoveIPC=no

log.nvlink-down
NVLink connects the GPUs of this machine, but one of them has no link that is up.
> nvidia-smi nvlink -s; sudo dmesg | grep -i -e nvlink -e Xid   # reset or replace the GPU
> systemctl status nvidia-fabricmanager nvidia-imex

log.p2p-nvlink
NVLink is there but P2P is not: the fabric manager is down, or the hardware has a fault.
> systemctl status nvidia-fabricmanager; nvidia-smi nvlink -s; sudo dmesg | grep Xid
> export NCCL_IGNORE_DISABLED_P2P=1   # only to go on without P2P

log.p2p-pcie
Consumer GPUs and many virtual machines have no P2P over PCIe; NCCL uses host memory instead.
> nvidia-smi topo -p2p r   # NS or CNS: expected on this hardware
> docker run --shm-size=16g ...   # host memory is used: give it room; NCCL_IGNORE_DISABLED_P2P=1 hides the message

log.peer-map
CUDA maps at most 8 peers a process and GPU.
> mpirun -np NUMBER_OF_GPUS ... -g 1   # one process a GPU

log.p2p-denied
NCCL chose P2P, and the driver refuses it: no peer access between the two GPUs, or processes that do not share what
IPC needs.
> nvidia-smi topo -p2p r
> export NCCL_P2P_DISABLE=1   # goes on through host memory; then look at driver, ACS and IOMMU

log.nvls
Multicast memory of the NVSwitch could not be set up: the fabric manager or the switches are in a bad state, or a
container or virtual machine may not. A fabric manager that did not run only has to be started. One that was stopped or
restarted while the GPUs stayed as they were (H100 and later) is not helped by one more restart: GPUs have to be reset
between its stop and its start. 'out of memory' means that the switches have no multicast group left: too many
communicators.
> export NCCL_NVLS_ENABLE=0   # goes on without; large sums inside the host are slower
> nvidia-smi -q | grep -i -A 2 fabric; systemctl status nvidia-fabricmanager   # on the host
> sudo systemctl enable --now nvidia-fabricmanager   # enough if it did not run (State is not Completed)
> # if it ran: end GPU programs and DCGM, then the next line; or reboot
> sudo systemctl stop nvidia-fabricmanager && sudo nvidia-smi -r && sudo systemctl start nvidia-fabricmanager

log.nvls-off
NVLink SHARP (sums made by the NVSwitch) could not be used, and NCCL goes on by rings and trees over NVLink. Results are
right; large sums inside a host are slower (8 H100, 4 to 8 GB: 330 instead of 430 GB/s of bus bandwidth were reported).
NCCL 2.27 and 2.28 go on where 2.29 fails, so the next version may not start.
> nvidia-smi -q | grep -i -A 2 fabric; systemctl status nvidia-fabricmanager
> aphro doctor explain log.nvls   # whether to start the fabric manager, or to reset the GPUs
> export NCCL_NVLS_ENABLE=0   # does not try, and says nothing

log.imex
NVLink across hosts needs the IMEX service and its channel devices.
> nvidia-imex-ctl -N; ls -l /dev/nvidia-caps-imex-channels
> export NCCL_MNNVL_ENABLE=0   # goes on without

log.fabric
On NVSwitch machines CUDA waits for the fabric manager, in exactly the driver's version.
> sudo systemctl enable --now nvidia-fabricmanager; systemctl status nvidia-fabricmanager

log.cuda-memory
NCCL or the program found no GPU memory left: another process, or too large a share for the KV cache.
> nvidia-smi   # who holds the memory; lower --gpu-memory-utilization, or NCCL_BUFFSIZE

log.cuda
A CUDA call inside NCCL failed. 'invalid argument' on some nodes only: a driver older than the library; 'illegal
memory access' or 'launch failure': the program, before NCCL; 'no kernel image': a build without this GPU.
> nvidia-smi   # driver: at least as new as the CUDA of the NCCL in use, equal on all nodes
> export NCCL_CUMEM_ENABLE=0   # to try; CUDA_LAUNCH_BLOCKING=1 finds the program's own error

log.no-libcuda
NCCL does not find the driver's library. It then goes on without what needs it, or fails at the first call.
> ldconfig -p | grep libcuda.so   # containers: --gpus all; WSL: LD_LIBRARY_PATH=/usr/lib/wsl/lib

log.nvml
NVML does not answer: kernel module and library of different versions, or a GPU that fell off the bus.
> nvidia-smi; cat /proc/driver/nvidia/version   # after a driver update: reload the module or reboot

log.topology
NCCL could not read the PCIe tree, or a topology file does not fit the machine.
> cat /etc/nccl.conf ~/.nccl.conf; unset NCCL_GRAPH_FILE   # a graph file fits one number of GPUs only
> unset NCCL_TOPO_FILE   # or the provider's file for this virtual machine; containers need /sys
> export NCCL_TOPO_DUMP_FILE=/tmp/topo.xml   # compare between nodes

log.watchdog
PyTorch's watchdog ended a collective that hung. This is a symptom: a rank is missing (same SeqNum and OpType on all
others), or ranks run different programs (they differ). The first error of any other rank is the cause.
> export TORCH_NCCL_TRACE_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1   # newer: TORCH_FR_BUFFER_SIZE=2000
> grep -h -m1 'NCCL WARN' LOGS   # the first one of any rank is the cause

log.engine-wait
A process of vLLM or SGLang got no message from another one for a minute, and again each minute. While workers compile,
capture graphs or load weights this is normal and ends; else one of them hangs, is gone, or runs with other flags.
> nvidia-smi; ps aux | grep -i -e worker -e nvcc -e ninja   # on each node: is every rank there, does it compile?
> py-spy dump --pid PID   # of the engine and each worker, twice: one that stands at the same line is where it hangs
> export NCCL_DEBUG=INFO VLLM_LOGGING_LEVEL=DEBUG   # and the log of every node; equal flags and versions on all

log.engine-timeout
The engine asked its workers for a step and got no answer in time (vLLM: 300 s), and ended. A symptom: a rank hangs in a
kernel or a collective, or is gone. The first error of any worker is the cause.
> py-spy dump --pid PID   # of each worker, before the time is over: all but one wait in a collective
> export NCCL_DEBUG=INFO   # and the log of every node; nvidia-smi: 100 % and little power: it spins in a collective

log.worker-lost
The framework reports that a process of its own ended, not why.
> # that process's own log: its last lines and first error
> sudo dmesg | grep -i -e oom -e 'killed process' -e segfault -e Xid   # on its host, at that time

log.ras-dead
NCCL's RAS could not reach a process for a minute: it ended, or its host did. The others wait for it.
> ssh HOST ps -p PID; ssh HOST sudo dmesg   # the process that the report names: out of memory, Xid, killed

log.ras-missing
A process did not answer NCCL's RAS while the report was made: it is stopped, ended a moment ago, or its host is
unreachable. After a minute RAS calls it dead.
> echo verbose status | nc localhost 28028   # once more: is it the same process?
> ssh HOST ps -o stat,wchan -p PID   # T: stopped; D: waits for a device

log.ras-mismatch
Ranks have issued different numbers of collectives. That is normal for a moment; if it stands still, the ranks behind
wait for something else, or their programs diverge.
> echo verbose status | nc localhost 28028   # twice: counts that grow are no fault

log.heartbeat
A rank lost its connection to another: that one ended first.
> # find the rank that failed first, in its own log

log.exception
A framework reports that NCCL returned an error; the cause is the first 'NCCL WARN' of any rank.
> export NCCL_DEBUG=INFO   # and read the first WARN

log.warn
NCCL printed a warning that is in no table here. Read it: it is the best evidence there is.
> export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=ALL   # for what came before it

log.trail
An error passed through NCCL (lines like 'init.cc:1358 -> 5'), and the log does not show the WARN that began it. The
number is the class: 1 CUDA, 2 system, 3 internal, 4 argument, 5 usage, 6 remote, 8 timeout.
> grep -h -m1 'NCCL WARN' LOGS   # of all ranks and nodes: the first one is the cause

log.numa
RCCL names host settings that cost speed or make it vary.
> sudo sysctl kernel.numa_balancing=0   # and iommu=pt on the kernel command line
"""
