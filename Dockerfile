# One node: the operations and the trainer. PyTorch brings the CUDA libraries, the base image what the
# driver wants to see; Triton compiles its launchers with gcc.
#   docker build -t gikernels . && docker run --gpus all --ipc host -v "$PWD/runs:/runs" gikernels doctor
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/gikernels
ENV PATH=/opt/gikernels/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

WORKDIR /src
COPY constraints.txt pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY gikernels gikernels
COPY trainer trainer
RUN pip install -c constraints.txt '.[trainer]'

# Not root. Runs, and what is compiled or fetched, lie in volumes that this user owns.
RUN useradd --create-home --uid 10001 gi \
    && mkdir /runs /cache \
    && chown gi:gi /runs /cache
ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface TRITON_CACHE_DIR=/cache/triton
USER 10001:10001
WORKDIR /runs
VOLUME ["/runs", "/cache"]
ENTRYPOINT ["gi"]
CMD ["doctor"]
