# flux-lora for a machine with an NVIDIA GPU. The host needs the NVIDIA container toolkit and a driver as new as the CUDA of
# torch's wheel. Not built where it was written, which had no docker.
#
#   docker build -t flux-lora .
#   docker run --rm -it --gpus all --ipc=host -v "$PWD/runs:/work/runs" -v "$HOME/.cache/huggingface:/root/.cache/huggingface" \
#       -v "$PWD/my_pictures:/work/my_pictures" flux-lora python train/train.py experiment=dev_16gb run=mine data.path=my_pictures
#
# torch's wheel brings CUDA, cuDNN and NCCL. gcc is for Triton, which compiles the fast path's kernels.
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev git && rm -rf /var/lib/apt/lists/*
WORKDIR /work
COPY . .
RUN pip install --no-cache-dir -e '.[heic,prodigy]'
CMD ["python", "train/train.py", "--help"]
