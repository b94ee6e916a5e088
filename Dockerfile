# Trainer and notification receiver; see docker-compose.yml.
FROM python:3.11.13-slim-bookworm

WORKDIR /app
RUN useradd --uid 1000 --create-home ppo && mkdir targets checkpoints .stack && chown ppo targets checkpoints .stack

COPY pyproject.toml constraints.txt README.md ./
COPY exporter exporter
COPY trainer trainer
RUN pip install --no-cache-dir -c constraints.txt '.[trainer]'
COPY stack stack

USER ppo
CMD ["python", "-m", "trainer"]
