# Not tried: no container registry could be reached where this was written. JupyterLab on the course:
#   docker build -t regolite . && docker run --rm -it -p 127.0.0.1:8888:8888 regolite
# With NVIDIA GPUs (their container toolkit on the host); without --shm-size the data loader's workers have 64 MB:
#   docker build -t regolite:gpu --target gpu . && docker run --rm -it --gpus all --shm-size 8g -p 127.0.0.1:8888:8888 regolite:gpu
# Anything else: docker run --rm -it -v "$PWD/runs:/regolite/runs" regolite python tasks.py demo --no-venv
FROM python:3.11-slim AS base
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /regolite
COPY . .
ENV PIP_NO_CACHE_DIR=1 PYTHONUTF8=1
EXPOSE 8888
CMD ["python", "-m", "jupyterlab", "--ip=0.0.0.0", "--no-browser", "--allow-root", "--LabApp.default_url=/lab/tree/notebooks"]

# The package index's PyTorch has CUDA with it; the host needs the driver only.
FROM base AS gpu
RUN python -m pip install -c constraints.txt -e ".[convert,course,transformers]"

FROM base AS cpu
RUN python -m pip install -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu \
    -e ".[convert,course,transformers]"
