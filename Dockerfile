# docker build -t kvlearn . && docker run --rm -p 127.0.0.1:8888:8888 -v "$PWD/work:/kvlearn/work" kvlearn
FROM python:3.12-slim
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends git make chromium >/dev/null \
    && rm -rf /var/lib/apt/lists/*
# The address of PyTorch's CPU builds makes the image smaller (README, Start).
ARG TORCH_INDEX=
RUN useradd --create-home learner && mkdir /kvlearn && chown learner /kvlearn
USER learner
WORKDIR /kvlearn
COPY --chown=learner . .
RUN make env TORCH_INDEX="$TORCH_INDEX" && .venv/bin/pip cache purge
EXPOSE 8888
CMD ["make", "lab", "ARGS=--ip 0.0.0.0 --no-browser"]
