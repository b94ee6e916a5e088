# Trainer and notification receiver; see docker-compose.yml and docs/kubernetes.md.
FROM python:3.11.15-slim-bookworm

WORKDIR /app
RUN useradd --uid 1000 --create-home ppo && mkdir targets checkpoints .stack && chown 1000 targets checkpoints .stack

COPY pyproject.toml constraints.txt README.md ./
COPY exporter exporter
COPY trainer trainer
RUN pip install --no-cache-dir -c constraints.txt '.[trainer]'
COPY stack stack

# By number: Kubernetes' `runAsNonRoot` does not look up names.
USER 1000
CMD ["python", "-m", "trainer"]
