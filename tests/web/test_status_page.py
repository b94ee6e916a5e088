"""The status page in a real browser, from a real exporter process."""

import math
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import bcrypt
import chromium
import pytest
from colors import color, contrast, luminance
from conftest import fetch
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.utils import floatToGoString

from exporter import MetricsServer, RunAggregator, Thresholds, emit_ppo_update
from exporter.health import STALLED_SECONDS, HealthLevel
from exporter.snapshot import HISTORY_UPDATES
from exporter.telemetry import TRAINING_SIGNALS, GradientStep, summarize_gradient_steps
from stack.servers import ROOT

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
PHONE = {"width": 320, "height": 640}
# The page's script asks again after 50 ms, so that tests need not sit out its waits.
IMPATIENT = "(real => { window.setTimeout = (call) => real(call, 50); })(setTimeout)"

expect.set_options(timeout=20_000)


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


@pytest.fixture(scope="module")
def endpoint() -> Iterator[tuple[RunAggregator, MetricsServer]]:
    aggregator = RunAggregator()
    with MetricsServer(aggregator, port=0) as server:
        yield aggregator, server


@pytest.fixture
def aggregator(endpoint) -> Iterator[RunAggregator]:
    """That of the endpoint, which all tests share; each begins without a run."""
    aggregator, _ = endpoint
    yield aggregator
    for run in list(aggregator.snapshot.runs):
        aggregator.remove_run(run)


@pytest.fixture
def complaints() -> list[str]:
    """What the consoles of pages say, a security policy's refusals among it."""
    return []


@pytest.fixture
def visit(browser, endpoint, complaints) -> Iterator[Callable[..., Page]]:
    """Opens the status page of the shared endpoint, or that of `url`; options are those of `Browser.new_context`."""
    contexts = []

    def open_it(url: str = endpoint[1].url, **options: object) -> Page:
        endpoint[1].flush()
        context = browser.new_context(**options)
        contexts.append(context)
        context.add_init_script(IMPATIENT)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url.removesuffix("metrics"))
        return page

    yield open_it
    for context in contexts:
        context.close()


def update(aggregator: RunAggregator, cv: float = 0.3, run: str = "r", norm: float = 1.0, **progress: object) -> None:
    if run not in aggregator.snapshot.runs:
        aggregator.register_run(run, ["op", "slot"])
    metrics = summarize_gradient_steps([GradientStep({"op": norm, "slot": 3.0}, 4.0)])
    emit_ppo_update({**metrics, "gradient_cv": cv}, run=run, handler=aggregator, **progress)


def live(page: Page):
    return page.get_by_role("banner").get_by_role("status").get_by_text("Live")


def icon(page: Page) -> str:
    """The color of the tab's icon."""
    return re.search(r"fill='(\w+)'", page.locator("link[rel=icon]").get_attribute("href"))[1]


def test_it_shows_what_metrics_says(aggregator, endpoint, visit):
    update(aggregator, norm=math.inf)
    page = visit()
    of_heads = ("ppo_head_gradient_norm", "ppo_head_gradient_share", "ppo_head_entropy_ratio")
    of_heads += ("ppo_nonfinite_gradients_total",)
    known = {name: 1 / (3 + place) for place, name in enumerate(TRAINING_SIGNALS)}
    entropies = {"op": 1 / 7, "slot": math.nan}
    for cv, norm, progress, of_them in ((math.inf, math.nan, {}, {}), (1.2345678901, 1 / 3, known, entropies)):
        update(aggregator, cv, norm=norm, environment_steps=2**53, head_entropy_ratios=of_them, **progress)
        expect(page.locator(".level")).to_have_text(re.compile(f"^CV:{cv:.3f} "))
        families = text_string_to_metric_families(fetch(endpoint[1].url)[1])
        samples = (sample for family in families for sample in family.samples)
        served = {(sample.name, sample.labels.get("head")): floatToGoString(sample.value) for sample in samples}
        signals = page.locator("[data-metric]").evaluate_all("rows => rows.map((row) => row.dataset.metric)")
        assert {f"ppo_{name}" for name in progress} < {*signals}
        places = [(name, head) for head in ("op", "slot") for name in of_heads if (name, head) in served]
        places += [(name, None) for name in signals]
        shown = page.locator("main data").evaluate_all("cells => cells.map((cell) => cell.value)")
        assert shown == [served[place] for place in [("ppo_gradient_cv", None), *places]]


def test_word_color_title_and_icon_tell_the_level_and_what_is_old_does_not_look_healthy(aggregator, visit):
    page = visit()
    expect(page.get_by_text("No run yet.")).to_be_visible()
    aggregator.register_run("r", ["op"])
    expect(page).to_have_title("No update yet · r")
    dim, summary = color(page, ".level"), page.get_by_role("main").get_by_role("status")
    expect(summary).to_have_text("1 run: 1 without an update")
    assert icon(page) == "gray"
    shown = {}
    for cv in (0.1, 0.7, 3.0, 0.1):
        update(aggregator, cv)
        level = Thresholds().level(cv)
        expect(page).to_have_title(f"CV:{cv:.3f} {level.word} · r")
        assert page.locator(".level").inner_text() == f"CV:{cv:.3f} {level.word}"
        assert summary.inner_text() == f"1 run: 1 {level.word}"
        assert icon(page) == level.color
        assert color(page, ".level") == shown.setdefault(level, color(page, ".level"))
    green, yellow, red = shown.values()
    assert green[1] > max(green[0], green[2]) and red[0] > max(red[1:]) and len({green, yellow, red, dim}) == 4
    expect(page.locator(".update")).to_have_text(re.compile(r"^last update [0-4] s ago$"))
    expect(page.get_by_text(re.compile(r"^level began [0-4] s ago$"))).to_be_visible()
    update(aggregator, run="r2")
    update(aggregator, timestamp_seconds=time.time() - STALLED_SECONDS - 60)
    expect(page.get_by_text("Stalled: last update 6 min ago")).to_be_visible()
    expect(page).to_have_title("stalled · r")
    expect(summary).to_have_text("2 runs: 1 stalled 1 stable")
    expect(page.get_by_role("table", name="All runs").get_by_role("row", name="r stalled 5")).to_be_visible()
    assert color(page, ".level") == color(page, ".signals td") == dim and icon(page) == "red"


TRAINER = f"""
import signal, time
from exporter import MetricsServer, RunAggregator, emit_ppo_update
from exporter.telemetry import GradientStep, summarize_gradient_steps
aggregator = RunAggregator()
metrics = summarize_gradient_steps([GradientStep({{"op": 1.0, "slot": 3.0}}, 4.0)])
emit_ppo_update(metrics, run="r", handler=aggregator, timestamp_seconds=time.time() - {STALLED_SECONDS} + 1.0)
print(MetricsServer(aggregator, port=0).url, flush=True)
signal.pause()
"""


def test_the_age_grows_while_the_trainer_is_stopped_and_there_is_no_answer_when_it_has_gone(visit):
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        url = trainer.stdout.readline().strip()
        trainer.send_signal(signal.SIGSTOP)
        page = visit(url)
        expect(page.get_by_text("Stalled: last update 5 min ago")).to_be_visible()
        expect(live(page)).to_be_visible()
        expect(page.locator(".level")).to_have_text("CV:0.707 warn")
    finally:
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
    alert = page.get_by_role("alert")
    expect(alert).to_have_text(re.compile("^No answer from the trainer since .*: it cannot be reached"))
    expect(page).to_have_title("No answer · stalled · r")
    expect(page.locator(".level")).to_have_text("CV:0.707 warn")
    red, *others = color(page, "#connection")
    assert red > max(others) and icon(page) == "gray"
    # Nobody may take old values for new ones, wherever they have scrolled to.
    page.set_viewport_size(PHONE)
    page.locator(".signals").scroll_into_view_if_needed()
    expect(alert).to_be_in_viewport(ratio=1)
    for text in ("main", ".level", ".facts", "figcaption", ".signals td", "#connection"):
        assert contrast(page, text) >= 4.5, text


class SomethingElse(BaseHTTPRequestHandler):
    answer: tuple[int, bytes]

    def do_GET(self) -> None:
        status, body = self.answer
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def test_it_tells_what_is_wrong_with_an_answer_and_goes_on_when_all_is_well(visit):
    aggregator = RunAggregator()
    update(aggregator)
    with MetricsServer(aggregator, port=0) as server:
        page = visit(server.url)
        expect(live(page)).to_be_visible()
    alert = page.get_by_role("alert")
    page.evaluate("(AbortSignal.patient = AbortSignal.timeout, AbortSignal.timeout = () => AbortSignal.patient(500))")
    with socket.create_server(("127.0.0.1", server.port)):
        expect(alert).to_have_text(re.compile("^No answer from the trainer since .*: none within 5 s"))
    page.evaluate("AbortSignal.timeout = AbortSignal.patient")
    with ThreadingHTTPServer(("127.0.0.1", server.port), SomethingElse) as other:
        threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
        SomethingElse.answer = 404, b"Not found."
        expect(alert).to_have_text(re.compile("^Nothing new since .*: the answer is 404 Not Found"))
        SomethingElse.answer = 200, b"<main>Another page</main>"
        expect(alert).to_have_text(re.compile("^Nothing new since .*: something else answers at this address"))
        other.shutdown()
    expect(page.locator(".level")).to_have_text("CV:0.300 stable")
    update(aggregator, cv=0.7)
    with MetricsServer(aggregator, port=server.port):
        expect(live(page)).to_be_visible()
        expect(page).to_have_title("CV:0.700 warn · r")


def test_it_is_live_for_who_has_written_name_and_password_into_the_address(tmp_path, visit):
    aggregator = RunAggregator()
    update(aggregator)
    file = tmp_path / "web.yml"
    file.write_text(f"basic_auth_users:\n  op: {bcrypt.hashpw(b'secret', bcrypt.gensalt(4)).decode()}\n")
    with MetricsServer(aggregator, port=0, web_config_file=file) as server:
        assert fetch(server.url.removesuffix("metrics"))[0] == 401
        page = visit(server.url.replace("//", "//op:secret@"))
        expect(live(page)).to_be_visible()
        update(aggregator, cv=0.7)
        expect(page.locator(".level")).to_have_text("CV:0.700 warn")


def test_it_is_brought_up_to_date_in_place(aggregator, visit):
    update(aggregator)
    update(aggregator, run="another")
    page = visit()
    page.evaluate("window.wasHere = true")
    page.get_by_text("What is shown here").click()
    runs = page.get_by_role("table", name="All runs")
    runs.get_by_role("link", name="another").focus()
    level = page.get_by_role("region", name="another").locator(".level")
    update(aggregator, cv=0.9, run="another", policy_loss=0.125)
    expect(level).to_have_text("CV:0.900 warn")
    expect(runs.get_by_role("row", name="another CV:0.900 warn 2")).to_be_visible()
    expect(page.get_by_role("row", name="policy loss 0.1250")).to_be_visible()
    expect(page.get_by_role("table", name="Metrics")).to_be_visible()
    update(aggregator, cv=math.inf, run="third")
    expect(page.get_by_role("region", name="third").locator(".level")).to_have_text("CV:inf BAD")
    expect(page).to_have_title("CV:inf BAD · third")
    aggregator.remove_run("r")
    expect(page.get_by_role("region")).to_have_count(2)
    assert page.evaluate("[wasHere, document.activeElement.textContent]") == [True, "another"]
    aggregator.remove_run("third")
    expect(runs).to_have_count(0)
    expect(page.get_by_role("region")).to_have_count(1)
    expect(level).to_have_text("CV:0.900 warn")


@pytest.mark.parametrize("thresholds", [Thresholds(), Thresholds(0.25, 1.5)])
def test_the_chart_has_a_point_per_update_both_thresholds_and_a_mark_where_a_gradient_was_not_finite(
    aggregator, visit, thresholds
):
    aggregator.register_run("r", ["op", "slot"], thresholds=thresholds)
    for cv in (0.1, 2.4, math.inf, 0.2):
        update(aggregator, cv)
    page = visit()
    chart = page.get_by_role("img", name="Gradient CV of the last 4 updates: lowest 0.100")
    expect(chart).to_be_visible()
    expect(chart).to_contain_text(f"{thresholds.warning} warn")
    expect(chart).to_contain_text(f"{thresholds.critical} BAD")
    points = [float(y) for y in re.findall(r"[ML]\d+ (\d+)", page.locator("path.cv").get_attribute("d"))]
    assert len(points) == 3
    assert page.locator("path.nonfinite").get_attribute("d").count("M") == 1
    # The line crosses the thresholds where their lines are.
    warning, critical = (line.bounding_box()["y"] for line in page.locator("line.threshold").all())
    height = (points[0] - points[1]) / (2.4 - 0.1) * (thresholds.critical - thresholds.warning) / 1000
    assert warning - critical == pytest.approx(height * chart.bounding_box()["height"], abs=1.5)
    for _ in range(HISTORY_UPDATES + 5):
        update(aggregator)
    expect(page.get_by_role("img", name=f"last {HISTORY_UPDATES} updates")).to_be_visible()
    expect(page.locator("figcaption")).to_have_text(re.compile("^Gradient CV, updates 10 to 309:"))


def test_without_javascript_it_is_a_table_that_the_browser_loads_anew(aggregator, visit):
    update(aggregator, policy_loss=0.5)
    page = visit(java_script_enabled=False)
    for row in (
        "gradient cv CV:0.300 stable",
        "policy loss 0.5000",
        "slot 3.000",
        "critical from 2.0, or the run's own threshold BAD",
    ):
        expect(page.get_by_role("row", name=row)).to_be_visible()
    expect(page.locator(".update time")).to_have_text(re.compile(r"^at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC$"))
    expect(page.get_by_role("banner").get_by_role("status")).to_have_text("Reloaded every 5 seconds")

    def with_a_shorter_wait(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, body=answer.text().replace('"refresh" content="5"', '"refresh" content="1"'))

    page.route("**/*", with_a_shorter_wait)
    page.reload()
    update(aggregator, cv=2.5)
    expect(page.locator(".level")).to_have_text("CV:2.500 BAD")


def test_names_are_text_and_nothing_but_its_own_script_runs(aggregator, visit, complaints):
    hostile = "</title><script>hacked = 1</script>\"'><img src=x onerror='hacked = 2'>{{ 7 * 7 }}\u202e&amp;"
    aggregator.register_run(hostile, [hostile], {"environment": hostile})
    update(aggregator, run=hostile)
    page = visit()
    expect(page.get_by_role("heading", level=2)).to_have_text(hostile)
    expect(page.get_by_role("rowheader", name=hostile)).to_be_visible()
    update(aggregator, cv=0.7, run=hostile)
    expect(page.locator(".level")).to_have_text("CV:0.700 warn")
    assert page.title() == f"CV:0.700 warn · {hostile}"
    assert page.locator("main script, main img:not([role])").count() == 0
    assert complaints == []
    with page.expect_event("console", lambda message: "inline event handler" in message.text):
        page.evaluate("document.head.append(Object.assign(document.createElement('script'), {text: 'hacked = 3'}))")
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=/metrics onerror=\"hacked = 4\">')")
    assert page.evaluate("typeof hacked") == "undefined"
    assert len(complaints) >= 2 and all("Content Security Policy" in text for text in complaints)
    assert "frame-ancestors 'none'" in page.reload().headers["content-security-policy"]


def test_it_can_be_read_on_a_phone_by_day_and_by_night(aggregator, visit):
    for cv in (0.0, 0.7, 3.0):
        update(
            aggregator,
            cv,
            run=f"{cv}-with-a-name-that-has-no-end" * 3,
            episodes=10**9,
            policy_loss=-1e-9,
            head_entropy_ratios={"op": 0.5, "slot": 1.0},
        )
    page = visit(viewport=PHONE)
    expect(live(page)).to_be_visible()
    page.get_by_role("link", name="docs").click()
    metrics = page.get_by_role("table", name="Metrics")
    expect(metrics.get_by_role("rowheader", name="ppo_gradient_cv", exact=True)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert (luminance(color(page, "body", "background-color")) > 0.5) == (scheme == "light")
        for text in ("body", ".facts", "figcaption", *(f".level.{level.color}" for level in HealthLevel)):
            assert contrast(page, text) >= 4.5, (scheme, text)
    # Names have the width, and what is said of them is beside or below, not out of sight.
    assert page.locator(".overview tbody th").first.bounding_box()["width"] > 200
    for cell in (".overview td:last-child", ".heads td:last-child"):
        box = page.locator(cell).first.bounding_box()
        assert box["x"] + box["width"] <= PHONE["width"], cell


def test_the_last_values_of_a_resumed_run_are_no_news_and_its_history_goes_on(aggregator, visit):
    update(aggregator, cv=2.5)
    state = aggregator.snapshot.runs["r"].plain()
    aggregator.remove_run("r")
    aggregator.register_run("r", ["op", "slot"])
    aggregator.resume_run("r", state)
    page = visit()
    expect(page).to_have_title("No update since the resume · r")
    before = color(page, ".level")
    update(aggregator, cv=2.75)
    expect(page).to_have_title("CV:2.750 BAD · r")
    assert color(page, ".level") != before
    expect(page.get_by_role("img", name="of the last 2 updates: lowest 2.500")).to_be_visible()


def test_a_run_with_too_few_heads_is_said_to_have_them(aggregator, visit):
    update(aggregator)
    aggregator.register_run("seven", [f"head-{number}" for number in range(7)])
    warning = visit().get_by_text("can never be reached")
    expect(warning).to_have_text(["2 heads: CV cannot exceed 1.414; critical at 2.0 can never be reached"])
