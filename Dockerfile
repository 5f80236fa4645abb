# A CPU image:   docker build -t ramulus .
# A CUDA image:  docker build -t ramulus --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#                docker run --gpus all ...   (torch's CUDA builds bring their own libraries: the driver alone comes from the host)
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE constraints.txt ./
COPY src ./src
RUN pip install --no-cache-dir build && RAMULUS_WHEEL_KERNELS=require python -m build --wheel --outdir /wheels

FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The compiler is for what a wheel does not bring: torch.compile (FlexAttention) on a GPU, kernels for other flags.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build /wheels /wheels
COPY constraints.txt /tmp/constraints.txt
RUN grep '^torch==' /tmp/constraints.txt | xargs pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" \
    && pip install --no-cache-dir "$(ls /wheels/*.whl)[all]" \
    && rm -rf /wheels /tmp/constraints.txt
RUN useradd --create-home ramulus && mkdir /work && chown ramulus /work
USER ramulus
WORKDIR /work
EXPOSE 38207
ENTRYPOINT ["ramulus"]
CMD ["--help"]
