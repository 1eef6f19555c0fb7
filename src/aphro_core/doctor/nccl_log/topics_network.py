"""What the findings on errors between hosts mean, and what to type."""

from __future__ import annotations

from typing import Final

TEXT: Final = """
log.net-mixed
Some hosts of the job chose InfiniBand (or a plug-in), others TCP sockets: they cannot talk to one another.
> ls /dev/infiniband; ibv_devinfo | grep -e hca_id -e state   # on the hosts that chose Socket: what is missing there
> export NCCL_NET=Socket   # on all hosts: goes on, slower

log.port-busy
The port is in use, often by an earlier run.
> ss -ltnp   # who holds the port; choose another, or end that process

log.ib-timeout
Completion status 12 (retries exceeded, vendor error 129): packets to the peer's NIC get no answer. RoCE: wrong GID,
VLAN, routing, PFC, or a firewall for UDP 4791. InfiniBand: the hosts are not in one fabric or partition. Or a link is
down, or the peer died.
> ib_write_bw -d mlx5_0 -x 3   # on one of the two nodes, then with the other's name: the NICs that the line names
> ibstat   # both ports ACTIVE, in one fabric (cloud: one placement group or availability set)
> export NCCL_IB_TIMEOUT=22   # only for a link that works but loses packets

log.ib-protection
The NIC was refused access to the GPU's buffer: ACS or an IOMMU in the way, or a peer-memory module of another driver.
> NCCL_NET_GDR_LEVEL=LOC ...   # works, slower: then it is GPUDirect
> sudo setpci -s BRIDGE ECAP_ACS+0x6.w=0000   # each PCIe bridge above GPU and NIC; or iommu=pt on the kernel line
> sudo modprobe -r nvidia_peermem && sudo modprobe nvidia_peermem

log.ib-flush
Requests that waited behind a failed one are flushed.
> # look for the first error of this NIC

log.ib-rnr
The receiver posted no buffers in time: it stalls or is gone.
> # look at the peer's log

log.ib-completion
A work request of the NIC failed with a rare status.
> ib_write_bw -d mlx5_0   # between the two NICs named; the same NCCL version and settings on both nodes

log.ib-event
The driver reported an event of a port or device: a link went down, or the NIC failed.
> ibstat; sudo dmesg | grep -i -e mlx5 -e 'link down'   # cable, switch port, firmware

log.ib-nomem
RDMA pins memory, and the limit on locked memory is too low for the process (a daemon's limit is inherited: slurmd,
containerd, ssh). If the limit is unlimited already: the GPU's BAR1 is full, or the kernel limits pinning.
> docker run --ulimit memlock=-1 --cap-add IPC_LOCK ...
> printf '* soft memlock unlimited\\n* hard memlock unlimited\\n' | sudo tee /etc/security/limits.d/rdma.conf
> # services such as slurmd: LimitMEMLOCK=infinity, then restart them
> grep -i locked /proc/PID/limits

log.ib-register
The NIC could not register a buffer. For GPU memory: the peer-memory module or DMA-BUF is missing or does not fit the
driver, or the virtual machine does not pass it through.
> sudo modprobe nvidia_peermem
> NCCL_NET_GDR_LEVEL=LOC ...   # works, slower: then it is GPUDirect; or NCCL_DMABUF_ENABLE=0

log.ib-mixed
InfiniBand and RoCE ports were paired.
> export NCCL_IB_HCA==mlx5_0,mlx5_1   # ports of one kind, exactly

log.ib-rail
The queue pair could not be connected in time: NICs of different rails or subnets have no route to one another, or the
pod's RoCE port is not on the RDMA network, or the GID is not routable.
> export NCCL_CROSS_NIC=0   # rails that are apart: each NIC talks to its own rail only
> export NCCL_IB_HCA==mlx5_0   # only ports that reach their peers: test with ib_write_bw -d mlx5_0 -x GID
> # pods: host network, or the RDMA interface (SR-IOV, macvlan) inside the pod

log.ib-unreachable
The RoCE port has no address or no route to the peer's, or ports of different networks were paired.
> show_gids; ip -br addr; ip route   # an address and a route on each RoCE port
> export NCCL_IB_HCA==mlx5_0,mlx5_1   # ports of one network

log.ib-gid
The queue pair was refused: the GID index is empty or of another type than the peer's.
> unset NCCL_IB_GID_INDEX   # NCCL 2.21 and later choose it
> show_gids   # before 2.21: export NCCL_IB_GID_INDEX=<RoCE v2 IPv4 index>

log.ib-open
A verbs device is listed but its /dev/infiniband/uverbs node is missing or may not be opened.
> ls -l /dev/infiniband
> docker run --device /dev/infiniband --cap-add IPC_LOCK --ulimit memlock=-1 --network host ...

log.ib-call
A call into libibverbs failed.
> ibv_devinfo -v; sudo dmesg | tail
> ulimit -l   # unlimited is wanted

log.ib-warn
The InfiniBand transport warns of something that may or may not matter: it matters if the communicator then fails.
> ibv_devinfo -v; show_gids; sudo dmesg | tail

log.nic-count
Nodes see different numbers of NICs, which can hang without a message.
> export NCCL_IB_HCA==mlx5_0,mlx5_1   # the same set on every node
> export NCCL_IGNORE_NET_MISMATCH=0   # fails early instead

log.no-plugin-start
The network plug-in is there but could not start: mostly its devices are not in the container or on this host.
> fi_info -p efa   # EFA: inside the container
> docker run --device /dev/infiniband/uverbs0 ...   # one --device for each EFA device
> # GPUDirect-TCPX(O): its daemon beside the job, and the NCCL_* variables of its guide, on every host

log.no-network
None of the networks that NCCL knows could be started: NCCL_NET or NCCL_NET_PLUGIN asks for one that is not there, or
the devices are not in the container.
> unset NCCL_NET NCCL_NET_PLUGIN
> docker run --device /dev/infiniband --cap-add IPC_LOCK --ulimit memlock=-1 --network host ...

log.ofi-warn
The libfabric plug-in warns of something that may or may not matter: it matters if the communicator then fails, or the
network chosen is Socket.
> fi_info -p efa; FI_LOG_LEVEL=warn NCCL_DEBUG=INFO ...

log.ofi-rails
Nodes (pods) have different numbers of EFA devices, so rails cannot be paired.
> # the same number of EFA devices in every pod: all of them
> export OFI_NCCL_FORCE_NUM_RAILS=2   # as many as the smallest node has

log.ofi-peer
The EFA peer does not answer: its process or host is gone, or a security group filters EFA traffic.
> kubectl get pods -o wide   # is the peer still there? its own log and dmesg come first
> # security group: allow all traffic from and to itself, inbound and outbound

log.ofi-error
A libfabric request failed.
> fi_info -p efa; FI_LOG_LEVEL=warn ...   # on both ends; look at the peer's log

log.net-name
NCCL_NET must be the exact name of a network that is loaded.
> unset NCCL_NET

log.provider-timeout
The provider's TCP transport (GPUDirect-TCPX) gets no control message from its peer: the peer is slow to start, or the
port is filtered between the hosts' data NICs.
> # is the rank at the address that the line names alive? the first use of a pair may take a minute
> ping -I INTERFACE PEER   # over the data NIC that the line names; firewall rules must open all of its ports

log.no-interface
NCCL_SOCKET_IFNAME matches no interface of this host that is up and has an address. NCCL 2.27 does not always say so:
it may fail later with a nonsense address family.
> unset NCCL_SOCKET_IFNAME
> ip route get PEER   # names the interface towards the other node
> export NCCL_SOCKET_IFNAME==eth0 GLOO_SOCKET_IFNAME=eth0   # that interface, on every node (== is exact)

log.refused
The peer's host answers, but nobody listens: the peer died or has not started, the rendezvous is stale, or the address
is another host's.
> # look at the peer's first error; start again with a new rendezvous id

log.connect
A TCP connection between ranks fails. 'Software caused connection abort' is NCCL 2.18 to 2.23 giving up after retries,
which hides the first reason: nobody listens there, or packets are lost.
> ip route get PEER   # names the interface towards the other node
> export NCCL_SOCKET_IFNAME==eth0 GLOO_SOCKET_IFNAME=eth0   # that interface, on every node (== is exact)
> # and look at the first error of the peer

log.no-route
The address that the peer advertises cannot be reached: a firewall rejects it, or it belongs to a network that is not
routed between the nodes.
> ip route get PEER   # names the interface towards the other node
> export NCCL_SOCKET_IFNAME==eth0 GLOO_SOCKET_IFNAME=eth0   # that interface, on every node (== is exact)
> sysctl net.ipv4.ip_local_port_range   # the TCP ports to open between the nodes, both ways

log.tcp-timeout
TCP connections get no answer: a firewall drops packets, or the wrong interface is used for the bootstrap.
> ip route get PEER   # names the interface towards the other node
> export NCCL_SOCKET_IFNAME==eth0 GLOO_SOCKET_IFNAME=eth0   # that interface, on every node (== is exact)
> sysctl net.ipv4.ip_local_port_range   # the TCP ports to open between the nodes, both ways

log.family
IPv4 and IPv6 addresses were mixed.
> export NCCL_SOCKET_FAMILY=AF_INET   # on every node

log.wrong-peer
A connection was answered by another kind of listener, or messages have other sizes than expected: two hosts of one
name, addresses that clash, or ranks with different NCCL versions, settings or calls.
> hostname; python -c 'import torch; print(torch.cuda.nccl.version())'; env | grep NCCL_   # only names may differ
> # messages of other sizes: the same collective calls and tensor shapes on all ranks
> export NCCL_SOCKET_IFNAME==eth0   # one interface with unique addresses

log.dns
A host name that ranks were given does not resolve.
> getent hosts NAME   # or give the IP address
"""
