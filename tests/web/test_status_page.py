"""The status page as somebody sees it: in a real browser, with a real run behind it."""

import gzip
import http.client
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

import bcrypt
import chromium
import pytest
from conftest import fetch, free_ports, wait_until
from playwright.sync_api import Browser, Page, expect, sync_playwright
from prometheus_client.parser import text_string_to_metric_families

from exporter import MetricsServer, RunAggregator, emit_ppo_update
from exporter.health import CRITICAL_THRESHOLD, STALLED_SECONDS, WARNING_THRESHOLD, HealthLevel, cv_text
from exporter.snapshot import HISTORY_UPDATES
from exporter.telemetry import TRAINING_SIGNALS, GradientStep, summarize_gradient_steps
from exporter.web.connections import Response
from stack.servers import ROOT
from trainer.environments.host_growth import ACTION_HEADS

ENDLESS = ("--checkpoint-every", "0", "--total-timesteps", "100000000", "--num-envs", "16", "--rollout-steps", "64")
LEVEL = {HealthLevel.HEALTHY: 0.0, HealthLevel.WARNING: 0.7, HealthLevel.CRITICAL: 3.0}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
PHONE = {"width": 320, "height": 640}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        executable, environment = chromium.provide()
    except chromium.ChromiumMissing as error:
        pytest.skip(str(error))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, env=environment, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class View:
    """A page, and what its console and its security policy had to say against it."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))


@pytest.fixture
def visit(browser) -> Iterator[Callable[..., View]]:
    """Opens a URL in a browser of its own; options are those of `Browser.new_context`."""
    contexts = []

    def open_it(url: str, **options: object) -> View:
        context = browser.new_context(**options)
        contexts.append(context)
        view = View(context.new_page())
        view.page.goto(url.removesuffix("metrics"))
        return view

    yield open_it
    for context in contexts:
        context.close()


@pytest.fixture
def train(tmp_path) -> Iterator[Callable[..., tuple[subprocess.Popen, str]]]:
    """Starts a trainer; gives it and its URL once it has completed an update."""
    trainers = []

    def start(*flags: str) -> tuple[subprocess.Popen, str]:
        port = str(free_ports().metrics)
        command = [sys.executable, "-m", "trainer", "--run", "r", "--metrics-port", port, *ENDLESS, *flags]
        with (tmp_path / "trainer.log").open("w") as log:
            trainer = subprocess.Popen(
                [*command, "--targets-dir", tmp_path], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )
        trainers.append(trainer)
        url = f"http://127.0.0.1:{port}/"

        def is_ready() -> bool:
            assert trainer.poll() is None, Path(log.name).read_text()
            try:
                return fetch(f"{url}-/ready")[0] == 200
            except OSError:
                return False

        wait_until(is_ready, "the trainer has completed an update")
        return trainer, url

    yield start
    for trainer in trainers:
        trainer.kill()
        trainer.wait()


@pytest.fixture
def aggregator() -> RunAggregator:
    return RunAggregator()


@pytest.fixture
def url(aggregator) -> Iterator[str]:
    with MetricsServer(aggregator, port=0) as server:
        yield server.url


def update(aggregator: RunAggregator, cv: float = 0.3, run: str = "r", norm: float = 1.0, **progress: object) -> None:
    metrics = summarize_gradient_steps([GradientStep({"op": norm, "slot": 3.0}, 4.0)])
    emit_ppo_update({**metrics, "gradient_cv": cv}, run=run, handler=aggregator, **progress)


def served(url: str) -> dict[tuple[str, str], float]:
    """Samples on `/metrics` of a process with one run, by name and head (empty where there is none)."""
    return {
        (sample.name, sample.labels.get("head", "")): sample.value
        for family in text_string_to_metric_families(fetch(f"{url}metrics")[1])
        for sample in family.samples
    }


SHOWN = """() => {
  const value = cell => parseFloat(cell.querySelector("data").value.replace("Inf", "Infinity"));
  const shown = [...document.querySelectorAll(".signals tr[data-metric]")].map(
    row => [row.dataset.metric, "", value(row)]);
  for (const row of document.querySelectorAll(".heads tbody tr")) {
    const [head, norm, share, , nonfinite] = row.children;
    shown.push(["ppo_head_gradient_norm", head.textContent, value(norm)]);
    shown.push(["ppo_head_gradient_share", head.textContent, value(share)]);
    shown.push(["ppo_nonfinite_gradients_total", head.textContent, value(nonfinite)]);
  }
  shown.push(["ppo_gradient_cv", "", value(document.querySelector(".level"))]);
  return shown;
}"""


def shown(page: Page) -> dict[tuple[str, str], float]:
    """The numbers on the page, as `served`."""
    return {(name, head): value for name, head, value in page.evaluate(SHOWN)}


def look_again(page: Page) -> None:
    """What the page does by itself every two seconds, now."""
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def color(page: Page, selector: str, what: str = "color") -> tuple[float, ...]:
    value = page.evaluate(f"getComputedStyle(document.querySelector({selector!r})).getPropertyValue({what!r})")
    return tuple(float(part) / 255 for part in re.findall(r"[\d.]+", value)[:3])


def icon(page: Page) -> str:
    """The color of the tab's icon."""
    return re.search(r"fill='(\w+)'", page.locator("link[rel=icon]").get_attribute("href"))[1]


def test_it_shows_what_metrics_says_while_a_run_is_going(train, visit):
    _, url = train("--drill", "nan:op:2-3")
    page = visit(url).page
    seen = set()

    def agrees() -> bool:
        # An update may come between the two; then one looks again.
        before = served(url)
        look_again(page)
        page.wait_for_timeout(100)
        on_page, after = shown(page), served(url)
        updates = after["ppo_updates_total", ""]
        if not before["ppo_updates_total", ""] == on_page["ppo_updates_total", ""] == updates > 3:
            return False
        assert len(on_page) >= 3 * len(ACTION_HEADS) + len(TRAINING_SIGNALS)
        assert on_page == {key: after[key] for key in on_page}
        assert {head for _, head in on_page} == {*ACTION_HEADS, ""}
        assert on_page["ppo_nonfinite_gradients_total", "op"] > 0
        assert page.locator(".level").inner_text() == cv_text(after["ppo_gradient_cv", ""])
        seen.add(updates)
        return len(seen) == 3

    wait_until(agrees, "page and /metrics agree on three updates")


def test_the_level_changes_its_word_and_color_with_a_drill_and_back(train, visit):
    _, url = train("--drill", "dominate:op:10s-16s")
    page = visit(url).page
    level = page.locator(".level")
    expect(level).to_have_text(re.compile(" stable$"), timeout=30_000)
    healthy = color(page, ".level")
    expect(level).to_have_text(re.compile(" BAD$"), timeout=30_000)
    critical = color(page, ".level")
    expect(page.get_by_role("main").get_by_role("status")).to_have_text("1 run: 1 BAD")
    expect(page).to_have_title(re.compile(r"^CV:\d\.\d{3} BAD · r$"))
    expect(level).to_have_text(re.compile(" stable$"), timeout=30_000)
    assert color(page, ".level") == healthy
    assert healthy[1] > max(healthy[0], healthy[2]) and critical[0] > max(critical[1:])


def test_a_trainer_that_is_stopped_or_killed_is_shown_as_dead_with_its_last_values(train, visit):
    trainer, url = train()
    page = visit(url).page
    alert, live = page.get_by_role("alert"), page.get_by_role("banner").get_by_role("status")
    expect(live).to_have_text("Live")
    trainer.send_signal(signal.SIGSTOP)
    expect(alert).to_have_text(re.compile("^No answer from the trainer since .*: none within 5 s"), timeout=30_000)
    assert icon(page) == "gray"
    trainer.send_signal(signal.SIGCONT)
    expect(live).to_have_text("Live", timeout=30_000)
    expect(alert).to_have_count(0)
    expect(page).to_have_title(re.compile("^CV:"))
    assert icon(page) != "gray"
    trainer.kill()
    expect(alert).to_have_text(re.compile("No answer from the trainer since .*: it cannot be reached"), timeout=15_000)
    expect(alert).to_be_visible()
    expect(page).to_have_title(re.compile("^No answer · CV:"))
    expect(page.locator(".level")).to_have_text(re.compile(r"^CV:\d\.\d{3} "))
    red, *others = color(page, "#connection")
    assert red > max(others)
    # Nobody may take old values for new ones, wherever they have scrolled to.
    page.set_viewport_size(PHONE)
    page.locator(".signals").scroll_into_view_if_needed()
    expect(alert).to_be_in_viewport(ratio=1)
    for text in ("main", ".level", ".facts", "figcaption", ".signals td", "#connection"):
        assert contrast(page, text) >= 4.5, text


def test_what_else_is_answered_is_told_apart_from_no_answer(visit):
    aggregator = RunAggregator()
    update(aggregator)
    with MetricsServer(aggregator, port=0) as server:
        page = visit(server.url).page
        expect(page.get_by_text("Live")).to_be_visible()
    alert = page.get_by_role("alert")
    said = {"Not found.": HTTPStatus.NOT_FOUND, "<main>Another page</main>": HTTPStatus.OK}
    reasons = ["the answer is 404 Not Found", "something else answers at this address"]
    for (text, status), reason in zip(said.items(), reasons):
        answer = Response.text(status, text)
        with MetricsServer(aggregator, port=server.port, handlers={"/": lambda request, answer=answer: answer}):
            expect(alert).to_have_text(re.compile(f"^Nothing new since .*: {reason}"), timeout=15_000)
    expect(page.locator(".level")).to_have_text("CV:0.300 stable")


def test_it_is_live_for_who_has_written_name_and_password_into_the_address(tmp_path, aggregator, visit):
    update(aggregator)
    file = tmp_path / "web.yml"
    file.write_text(f"basic_auth_users:\n  op: {bcrypt.hashpw(b'secret', bcrypt.gensalt(4)).decode()}\n")
    with MetricsServer(aggregator, port=0, web_config_file=file) as server:
        page = visit(server.url.replace("//", "//op:secret@")).page
        expect(page.get_by_text("Live")).to_be_visible()
        update(aggregator, cv=0.7)
        expect(page.locator(".level")).to_have_text("CV:0.700 warn")


def test_it_is_brought_up_to_date_in_place(aggregator, url, visit):
    update(aggregator)
    update(aggregator, run="another")
    page = visit(url).page
    page.evaluate("window.wasHere = true")
    page.get_by_text("What is shown here").click()
    runs = page.get_by_role("table", name="All runs")
    runs.get_by_role("link", name="another").focus()
    level = page.get_by_role("region", name="another").locator(".level")
    expect(level).to_have_text("CV:0.300 stable")
    update(aggregator, cv=0.9, run="another", policy_loss=0.125)
    expect(level).to_have_text("CV:0.900 warn")
    expect(runs.get_by_role("row", name="another CV:0.900 warn 2")).to_be_visible()
    expect(page.locator("tr[data-metric=ppo_policy_loss] data")).to_have_text("0.1250")
    assert page.evaluate("[wasHere, document.activeElement.textContent]") == [True, "another"]
    expect(page.get_by_role("table", name="Metrics")).to_be_visible()
    update(aggregator, cv=math.inf, run="third")
    expect(page.get_by_role("region", name="third").locator(".level")).to_have_text("CV:inf BAD")
    expect(page).to_have_title("CV:inf BAD · third")
    aggregator.remove_run("r")
    expect(page.get_by_role("region")).to_have_count(2)
    assert page.evaluate("document.activeElement.textContent") == "another"
    aggregator.remove_run("third")
    expect(runs).to_have_count(0)
    expect(page.get_by_role("region")).to_have_count(1)
    expect(level).to_have_text("CV:0.900 warn")


def test_the_chart_has_a_point_per_update_both_thresholds_and_a_mark_where_a_gradient_was_not_finite(
    aggregator, url, visit
):
    for cv in (0.1, 2.4, math.inf, 0.2):
        update(aggregator, cv)
    page = visit(url).page
    chart = page.get_by_role("img", name="Gradient CV of the last 4 updates: lowest 0.100")
    expect(chart).to_be_visible()
    expect(chart).to_contain_text(f"{WARNING_THRESHOLD} warn")
    expect(chart).to_contain_text(f"{CRITICAL_THRESHOLD} BAD")
    assert len(re.findall("[ML]", page.locator("path.cv").get_attribute("d"))) == 3
    assert page.locator("path.nonfinite").get_attribute("d").count("M") == 1
    # The line crosses the thresholds where their lines are.
    box = chart.bounding_box()
    lines = [line.bounding_box()["y"] for line in page.locator("line.threshold").all()]
    points = [float(y) for y in re.findall(r"[ML]\d+ (\d+)", page.locator("path.cv").get_attribute("d"))]
    height = (points[0] - points[1]) / (2.4 - 0.1) * (CRITICAL_THRESHOLD - WARNING_THRESHOLD) / 1000
    assert lines[0] - lines[1] == pytest.approx(height * box["height"], abs=1.5)
    for _ in range(HISTORY_UPDATES + 5):
        update(aggregator)
    expect(page.get_by_role("img", name=f"last {HISTORY_UPDATES} updates")).to_be_visible()
    expect(page.locator("figcaption")).to_have_text(re.compile("^Gradient CV, updates 10 to 309:"))


def test_without_javascript_it_is_a_table_that_the_browser_loads_anew(aggregator, url, visit):
    update(aggregator, policy_loss=0.5)
    page = visit(url, java_script_enabled=False).page
    signals = page.get_by_role("table", name="Signals")
    expect(signals.get_by_role("row", name="gradient cv CV:0.300 stable")).to_be_visible()
    expect(signals.get_by_role("row", name="policy loss 0.5000")).to_be_visible()
    expect(page.get_by_role("table", name="Gradient per head").get_by_role("row", name="slot 3.000")).to_be_visible()
    expect(page.get_by_role("banner").get_by_role("status")).to_have_text("Reloaded every 5 seconds")
    expect(page.locator("time")).to_have_text(re.compile(r"^at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC$"))
    expect(page.get_by_role("row", name="critical from 2.0 BAD")).to_be_visible()
    update(aggregator, cv=2.5)
    expect(page.locator(".level")).to_have_text("CV:2.500 BAD", timeout=20_000)


def test_names_are_text_and_nothing_but_its_own_script_runs(aggregator, url, visit):
    hostile = "</title><script>hacked = 1</script>\"'><img src=x onerror='hacked = 2'>{{ 7 * 7 }}\u202e&amp;"
    aggregator.register_run(hostile, [hostile], {"environment": hostile})
    update(aggregator, run=hostile)
    view = visit(url)
    page = view.page
    expect(page.get_by_role("heading", level=2)).to_have_text(hostile)
    expect(page.get_by_role("rowheader", name=hostile)).to_be_visible()
    update(aggregator, cv=0.7, run=hostile)
    expect(page.locator(".level")).to_have_text("CV:0.700 warn")
    assert page.title() == f"CV:0.700 warn · {hostile}"
    assert page.locator("main script, main img:not([role])").count() == 0
    assert view.complaints == []
    page.evaluate("document.head.append(Object.assign(document.createElement('script'), {text: 'hacked = 3'}))")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=/metrics onerror=\"hacked = 4\">')")
    page.wait_for_timeout(200)
    assert page.evaluate("typeof hacked") == "undefined"
    assert len(view.complaints) >= 2 and all("Content Security Policy" in text for text in view.complaints)


def test_a_screen_reader_finds_its_way(aggregator, url, visit):
    aggregator.register_run("r", ["op", "slot", "idle"])
    update(aggregator)
    page = visit(url).page
    expect(page.locator("body")).to_match_aria_snapshot("""
        - banner:
          - heading "PPO gradient health" [level=1]
          - status: Live
          - navigation "Endpoint":
            - link "/metrics"
            - link "/-/ready"
            - link "docs"
        - main:
          - status: "1 run: 1 stable"
          - region "r":
            - heading "r" [level=2]
            - paragraph: CV:0.300 stable
            - figure /Gradient CV, updates 1 to 1/
            - table "Gradient per head":
              - rowgroup:
                - row:
                  - columnheader "head"
                  - columnheader "norm"
                  - columnheader "share"
                  - columnheader "non-finite"
              - rowgroup:
                - row /^op 1.000 25.0 % 0$/
                - row /^slot 3.000 75.0 % 0$/
                - row /^idle no gradient 0$/
            - table "Signals"
        - contentinfo
    """)
    page.get_by_role("link", name="docs").click()
    expect(page.get_by_role("row", name="critical from 2.0 BAD")).to_be_visible()
    expect(page.get_by_role("rowheader", name="ppo_gradient_cv", exact=True)).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_on_a_phone_by_day_and_by_night(aggregator, url, visit, scheme):
    for level, cv in LEVEL.items():
        update(aggregator, cv, run=level + "-with-a-name-that-has-no-end" * 3, episodes=10**9, policy_loss=-1e-9)
    page = visit(url, viewport=PHONE, color_scheme=scheme).page
    expect(page.get_by_text("Live")).to_be_visible()
    page.get_by_role("link", name="docs").click()
    expect(page.get_by_role("table", name="Metrics")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert (luminance(color(page, "body", "background-color")) > 0.5) == (scheme == "light")
    for text in ("body", ".facts", "figcaption", *(f".level.{level.color}" for level in HealthLevel)):
        assert contrast(page, text) >= 4.5, text
    # Names have the width, and what is said of them is beside or below, not out of sight.
    assert page.locator(".overview tbody th").first.bounding_box()["width"] > 200
    for cell in (".overview td:last-child", ".heads td:last-child"):
        box = page.locator(cell).first.bounding_box()
        assert box["x"] + box["width"] <= PHONE["width"], cell


def contrast(page: Page, text: str) -> float:
    """Of the text with the page behind it: https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio, AA wants 4.5."""
    dark, light = sorted(map(luminance, (color(page, text), color(page, "body", "background-color"))))
    return (light + 0.05) / (dark + 0.05)


def luminance(rgb: tuple[float, ...]) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def test_runs_without_an_update_and_stalled_ones_do_not_look_healthy(aggregator, url, visit):
    page = visit(url).page
    expect(page.get_by_text("No run yet.")).to_be_visible()
    aggregator.register_run("r", ["op"])
    expect(page).to_have_title("No update yet · r")
    waiting, summary = color(page, ".level"), page.get_by_role("main").get_by_role("status")
    expect(summary).to_have_text("1 run: 1 without an update")
    assert icon(page) == "gray"
    update(aggregator, cv=0.1)
    expect(page.locator(".update")).to_have_text(re.compile(r"^last update [0-4] s ago$"))
    assert color(page, ".level") != waiting and icon(page) == "green"
    update(aggregator, run="r2")
    update(aggregator, timestamp_seconds=time.time() - STALLED_SECONDS - 60)
    expect(page.get_by_text("Stalled: last update 6 min ago")).to_be_visible()
    expect(page).to_have_title("stalled · r")
    expect(summary).to_have_text("2 runs: 1 stalled 1 stable")
    expect(page.get_by_role("table", name="All runs").get_by_role("row", name="r stalled 2")).to_be_visible()
    assert color(page, ".level") == color(page, ".signals td") == waiting and icon(page) == "red"


def test_the_last_values_of_a_resumed_run_are_no_news(aggregator, url, visit):
    update(aggregator, cv=2.5)
    state = aggregator.snapshot.runs["r"].plain()
    aggregator.remove_run("r")
    aggregator.register_run("r", ["op", "slot"])
    aggregator.resume_run("r", state)
    page = visit(url).page
    expect(page).to_have_title("No update since the resume · r")
    before = color(page, ".level")
    update(aggregator, cv=2.5)
    expect(page).to_have_title("CV:2.500 BAD · r")
    assert color(page, ".level") != before


def test_a_run_with_too_few_heads_is_said_to_have_them(aggregator, url, visit):
    update(aggregator)
    page = visit(url).page
    expect(page.get_by_text("2 heads: CV cannot exceed 1.414; critical at 2.0 can never be reached")).to_be_visible()
    aggregator.remove_run("r")
    aggregator.register_run("r", ACTION_HEADS)
    expect(page).to_have_title("No update yet · r")
    expect(page.get_by_text("can never be reached")).to_have_count(0)


def test_its_path_is_like_the_others(aggregator, url):
    update(aggregator)
    connection = http.client.HTTPConnection(url.split("/")[2])

    def ask(method: str, path: str = "/", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer, answer.read()

    answer, body = ask("GET")
    assert answer.status == 200 and b"CV:0.300 stable" in body
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert re.fullmatch(r"'sha256-[^']+'", policy["script-src"]) and re.fullmatch(
        r"'sha256-[^']+'", policy["style-src"]
    )
    assert gzip.decompress(ask("GET", **{"Accept-Encoding": "gzip"})[1]) == body
    answer, nothing = ask("HEAD")
    assert (answer.status, int(answer.headers["Content-Length"]), nothing) == (200, len(body), b"")
    assert ask("POST")[0].status == 405
    answer, text = ask("GET", "/status")
    assert answer.status == 404 and b" /," in text
    connection.close()


def test_the_history_goes_on_after_a_resume(aggregator):
    update(aggregator, cv=0.25)
    later = RunAggregator()
    later.register_run("r", ["op", "slot"])
    later.resume_run("r", aggregator.snapshot.runs["r"].plain())
    update(later, cv=0.5)
    assert later.snapshot.runs["r"].recent_gradient_cvs == (0.25, 0.5)
