"""What the findings on transports, choices and the log itself mean, and what to type."""

from __future__ import annotations

from typing import Final

TEXT: Final = """
log.gdrdma
Network channels carry /GDRDMA: the NIC reads and writes GPU memory itself. This suffix is the only proof of it in a
log; 'Enabled for HCA' and 'GDR 1' only say that it is possible.
> # nothing to do

log.rdma-no-gdr
Data crosses the network by RDMA, but through host memory: one side or both lack /GDRDMA. Usual reasons: the peer-
memory module is not loaded (or NCCL before 2.23.4 does not see it), no DMA-BUF, GPU and NIC behind different PCIe
switches, an EFA type without GPUDirect. On DGX Spark (GB10) it is normal: memory is shared.
> sudo modprobe nvidia_peermem && echo nvidia_peermem | sudo tee /etc/modules-load.d/nvidia_peermem.conf
> # or DMA-BUF: open GPU kernel modules, kernel 5.12 or newer, CUDA 11.7 or newer
> nvidia-smi topo -m   # PIX or PXB between GPU and NIC? One NIC a PCIe switch; NCCL_NET_GDR_LEVEL=SYS only if measured

log.gdr-mixed
Some channels use GPUDirect RDMA and some do not: one node lacks the peer-memory module, or one NIC is too far from
the GPU (another PCIe switch or socket). The slowest channel sets the pace.
> sudo modprobe nvidia_peermem   # on the node whose lines lack /GDRDMA
> nvidia-smi topo -m   # and per rank one NIC that is near: NCCL_IB_HCA

log.gdr-off
NCCL says that GPUDirect RDMA is off for a NIC, and the log shows no Channel line that would decide.
> sudo modprobe nvidia_peermem && echo nvidia_peermem | sudo tee /etc/modules-load.d/nvidia_peermem.conf
> # or DMA-BUF: open GPU kernel modules, kernel 5.12 or newer, CUDA 11.7 or newer

log.sockets
NCCL talks TCP. Between nodes that have InfiniBand, RoCE or EFA this is slow; NET/Socket on an ib0 interface is TCP
too. While all ranks share one host it is only the fallback that nobody uses.
> ibv_devinfo   # InfiniBand or RoCE: an ACTIVE port, libibverbs in the image, /dev/infiniband in the container
> # EFA: aws-ofi-nccl and every /dev/infiniband/uverbs*; Slingshot: aws-ofi-nccl or aws-ofi-rccl
> # no such network: nothing to do

log.provider-tcp
The cloud provider's own TCP transport (FastSocket, GPUDirect-TCPX): the best there is on such instances.
> # nothing to do

log.p2p
GPUs of one host copy to one another directly, over NVLink or PCIe.
> # nothing to do

log.mnnvl
NVLink reaches across hosts (an NVLink rack).
> # nothing to do

log.shm
GPUs of one host copy through shared host memory: no peer access (consumer GPUs, virtual machines), P2P switched off,
or GPUs on different sockets. It works, slower than P2P.
> nvidia-smi topo -p2p r   # OK between the GPUs? Then look at NCCL_P2P_DISABLE, NCCL_P2P_LEVEL, ACS and IOMMU
> # consumer GPUs without peer access: expected; give /dev/shm room: docker run --shm-size=16g

log.net-in-host
Ranks of one host talk through a NIC: their containers are isolated from one another, P2P and SHM are switched off, or
the NICs are faster than the way between the GPUs.
> docker run --ipc=host ...   # one container (pod) with all GPUs of a host, or a shared IPC namespace and /dev/shm
> unset NCCL_P2P_DISABLE NCCL_SHM_DISABLE

log.no-transport
No line of the log says how ranks talk. Since NCCL 2.22 connections are made at first use, so 'Init COMPLETE' proves
nothing about the network; Ray folds lines that look alike.
> export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,ENV,NET,GRAPH,BOOTSTRAP RAY_DEDUP_LOGS=0
> export NCCL_DEBUG_FILE=/tmp/nccl.%h.%p.log   # one file a process; and run one collective

log.env
NCCL itself says that it read a variable that forces a slower or wrong choice. It may come from the shell, the image,
or nccl.conf.
> grep -s NCCL_ /etc/nccl.conf ~/.nccl.conf   # if it is not set in the shell

log.interfaces
The interfaces that NCCL would use include some that other hosts cannot reach (container bridges, VPN, link-local
addresses), or several networks: connections may pick the wrong one.
> ip route get PEER   # names the interface towards the other node
> export NCCL_SOCKET_IFNAME==eth0 GLOO_SOCKET_IFNAME=eth0   # that interface, on every node (== is exact)

log.loopback
NCCL advertises a loopback address: other hosts can never reach it. Either NCCL_SOCKET_IFNAME selects lo, or the host
name resolves to 127.*.
> export NCCL_SOCKET_IFNAME=^lo,docker
> grep 127 /etc/hosts   # the host's own name must not stand there

log.link-local
A link-local address (fe80:, 169.254.) was advertised, which other hosts reach only with luck: an interface without an
address of its own was taken, such as an IPoIB, pod, USB or BMC interface. On a cable between two hosts it may be meant.
> export NCCL_SOCKET_FAMILY=AF_INET
> export NCCL_SOCKET_IFNAME==eth0 GLOO_SOCKET_IFNAME=eth0   # the interface on the common subnet, on every node

log.docker-bridge
NCCL advertises an address of a container bridge, which other hosts cannot reach.
> docker run --network host ...

log.same-name
Hosts with different addresses bear one name. NCCL tells hosts apart by name and boot id, so ranks may take another
host for their own.
> sudo hostnamectl set-hostname node1   # a name of its own on each host; or export NCCL_HOSTID=node1

log.no-rdma-device
An RDMA plug-in is loaded, but there is no usable device: fine on one host, TCP between several.
> ls /dev/infiniband; ibv_devinfo
> docker run --device /dev/infiniband --cap-add IPC_LOCK --ulimit memlock=-1 --network host ...

log.version
Ranks use different NCCL libraries: PyTorch's own, the image's, or one from LD_PRELOAD.
> python -c 'import torch; print(torch.cuda.nccl.version())'   # on every node: equal
> unset LD_PRELOAD   # or whatever brings in the second libnccl

log.folded
Ray leaves out lines that look alike, so lines of other ranks are missing from this log.
> export RAY_DEDUP_LOGS=0

log.torn
Lines were cut, or mixed by several writers; what was whole was read.
> export NCCL_DEBUG_FILE=/tmp/nccl.%h.%p.log   # one file a process

log.one-gpu-nodes
Every rank counts as a node of its own. If these are pods or containers of one host, NVLink and shared memory between
its GPUs are not used.
> # run one pod (container) with all GPUs of a host
"""
