# Training and inference on NVIDIA GPUs. Not built or run here: no registry of images was within reach.
#
#     docker build -t uground .
#     docker run --gpus all --shm-size 8g -v /data:/data -v $PWD/runs:/uground/runs uground \
#         deepspeed train_ds.py --config configs/7b_reason_seg.yaml --dataset_dir /data
#
# torch brings CUDA's libraries. The devel image adds the compiler and headers, with which DeepSpeed builds its own
# kernels (DeepSpeedCPUAdam); without them, the base image of the same version is enough.
# Its CUDA is that of the torch in requirements.txt, and needs a driver of 580 or newer (docs/install.md).
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# Python 3.12; g++ for packages without a wheel
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /uground
# the packages before the code: a change of the code does not install them again
COPY requirements.txt constraints.txt ./
COPY scripts/setup.sh scripts/setup.sh
RUN PIP_CONSTRAINT=/uground/constraints.txt bash scripts/setup.sh && rm -rf /root/.cache/pip
ENV PATH=/uground/.venv/bin:$PATH

COPY . .
