# aphro in a container, for heads and workers alike: docs/containers.md has the `docker run` lines.
# torch's wheels bring CUDA; the host brings the driver (NVIDIA Container Toolkit, `--gpus all`). On CPUs it runs as it is.
FROM python:3.12-slim

# a C compiler for the launchers that Triton makes at the first start; ssh for --hosts; ip and ss for `aphro doctor`.
# Host keys are made where a container starts: the same in every copy of an image they would be nobody's.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev openssh-client openssh-server iproute2 \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
    && mkdir -p /run/sshd

WORKDIR /opt/aphro
COPY . .
RUN pip install --no-cache-dir '.[ray]'

# kernels of GPUs and CPUs, digests and models that came from the head: mount a volume here to keep them
ENV XDG_CACHE_HOME=/var/cache/aphro TRITON_CACHE_DIR=/var/cache/aphro/triton
VOLUME /var/cache/aphro

EXPOSE 2242
ENTRYPOINT ["aphro"]
CMD ["--help"]
