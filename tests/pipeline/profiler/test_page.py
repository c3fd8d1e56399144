import dataclasses
import html.parser
import json
import re
import shutil
import subprocess

import pytest
from click.testing import CliRunner

from imagefeed.pipeline.cli import main
from imagefeed.pipeline.profiler.figures import duration, number, percent, scaled, signed
from imagefeed.pipeline.profiler.findings import Evidence, Settings
from imagefeed.pipeline.profiler.measure import FEW_STEPS
from imagefeed.pipeline.profiler.page import render_html
from imagefeed.pipeline.profiler.plots import PHASES, fit
from imagefeed.pipeline.profiler.report import advice, verdict
from tests.profiles import HOSTILE, profile

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
# No network, a profile of its own, nothing that is asked for at a first start.
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --virtual-time-budget=2000"
WIDTHS = (360, 390, 1280)
# What a browser makes of the page in a frame: it tells the page around it. Tables below the plots are opened first.
PROBE = """<script>
for (const details of document.querySelectorAll("details")) details.open = true;
const page = document.scrollingElement, seen = selector => [...document.querySelectorAll(selector)];
parent.postMessage([innerWidth, {
  width: page.scrollWidth,
  card: getComputedStyle(document.querySelector("header")).backgroundColor,
  narrow: seen("svg").filter(plot => plot.getBoundingClientRect().width < 30).length,
  outside: seen("svg text, p, h1, h2").map(text => text.getBoundingClientRect())
    .filter(box => box.left < 0 || box.right > innerWidth).length,
}], "*");
</script>"""
# A window is never narrower than 500 pixels; a frame is.
FRAMES = """<!doctype html><html><meta name="color-scheme" content="light dark"><body></body><script>
const told = {}, widths = [WIDTHS];
onmessage = event => { told[event.data[0]] = event.data[1]; document.body.textContent = JSON.stringify(told); };
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style = `border:0; height:900px; width:${width}px`;
  frame.src = "probed.html";
  document.documentElement.append(frame);
}
</script></html>"""


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the text within each of them; fails where they are not closed in turn."""

    def __init__(self, source: str):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag=None):
        return "".join(data for within, data in self.texts if tag in (None, within))


@pytest.fixture(scope="module")
def source():
    return render_html(profile())


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


def test_page_opens_with_the_verdict(page):
    assert page.text("span").startswith("Input-bound")
    assert verdict(profile()) in page.text()
    assert len(page.named("h1")) == 1
    assert page.text("title").startswith("Input-bound: profile of imagefeed")


def test_page_asks_for_nothing_outside_itself(source, page):
    assert not re.search(r"(https?:)?//", re.sub(r"/\*.*?\*/", "", source))
    assert not re.search(r"url\(|@import|<script", source)
    assert page.named("link") == [{"rel": "icon", "href": "data:,"}]
    (policy,) = (meta["content"] for meta in page.named("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")


def test_ids_are_unique_and_every_section_has_its_heading(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [section["aria-labelledby"] for section in page.named("section")] == ids


def test_text_from_outside_is_escaped(source, page):
    assert HOSTILE not in source and "<all>" not in source and "<seen>" not in source
    assert f"imagefeed profile of {HOSTILE}" in page.text()
    assert "Stop the other programs <all>." in page.text() and "Gain of <seen>" in page.text()


def test_every_plot_says_what_it_shows(source, page):
    plots = [attributes for attributes in page.named("svg") if attributes.get("role") == "img"]
    assert len(plots) > 20
    assert source.count('role="img"') == len(re.findall(r'<svg role="img"[^>]*>\s*<title>[^<]+</title>', source))


def test_every_plot_has_its_numbers_in_a_table(page):
    assert page.text("caption") == (
        "Fixes and their predicted gainsCausesImages per secondStagesThe mean and the slowest stepsSamples"
    )
    cells = page.text("td") + page.text("th")
    for figure in (
        "2,430",
        "1,550 (1,540 to 1,560)",
        "0.5",
        "libjpeg-turbo, 2 cores",
        "83\N{NO-BREAK SPACE}%",
        "123\N{NO-BREAK SPACE}ms",
    ):
        assert figure in cells, figure


def test_waterfall_says_how_near_each_stage_is_to_its_limit(page):
    notes = page.text("p")
    assert "0.50 of the limit, libjpeg-turbo, 2 cores 3,100" in notes
    assert "above the limit, memory bandwidth 7,200" in notes
    assert "empty, 83\N{NO-BREAK SPACE}%" in notes


def test_what_the_first_fix_achieved_stands_beside_what_was_predicted(page):
    figures = page.text("span")
    assert "2,300 images/s +67\N{NO-BREAK SPACE}%" in figures and "2,200 images/s +59\N{NO-BREAK SPACE}%" in figures


def test_without_fixes_the_page_says_that_there_is_nothing_to_gain():
    found = profile(fixes=(), tried=None)
    text = Page(render_html(found)).text()
    assert f"{advice(found)[0]} The run reaches 0.57 of its ceiling." in text and "Tried" not in text


def test_any_loader_and_loop_can_be_shown():
    """Without the stages and settings of ours, with phases of other names."""
    bare = profile()
    steps = tuple(dataclasses.replace(step, phases={"step": 0.01, "logging": 0.002}, spans=()) for step in bare.steps)
    settings = Settings(device="CPU", precision="float32", cores=2, batch_size=8, loader="DataLoader")
    rates = {name: bare.rates[name] for name in ("together", "training")}
    found = dataclasses.replace(bare, steps=steps, settings=settings, rates=rates, evidence=Evidence(), gains={}, stalls=())
    text = Page(render_html(found)).text()
    assert "imagefeed profile of a DataLoader" in text
    assert "other phases" in text and "images/s of the loader alone" not in text and "Meanwhile" not in text


def test_timeline_of_many_steps_is_thinned_and_keeps_the_slowest():
    found = profile(10_000)
    slowest = dataclasses.replace(found.steps[4321], wait_s=1.0)
    found = dataclasses.replace(found, steps=(*found.steps[:4321], slowest, *found.steps[4322:]))
    source = render_html(found)
    assert len(source.encode()) < 300_000
    text = Page(source).text()
    assert "The slowest, step 4,321, 1.01\N{NO-BREAK SPACE}s" in text
    assert re.search(r"slowest of 4\d, step 4,321: 1.01\N{NO-BREAK SPACE}s", text)
    assert "1,001 stalled steps" in text


def test_late_stall_is_shaded_from_where_it_begins():
    late = dataclasses.replace(profile().stalls[0], kind="late", first_step=30, period=None)
    (shade,) = (rect for rect in Page(render_html(profile(stalls=(late,)))).named("rect") if rect.get("class") == "late")
    assert (shade["x"], shade["width"]) == ("75%", "25%")


def test_text_and_plots_contrast_with_their_ground_in_both_themes(source):
    def luminance(color):
        parts = (int(color[n : n + 2], 16) / 255 for n in (1, 3, 5))
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    colors = re.findall(r"--(\w+):light-dark\((#\w{6}),(#\w{6})\)", source)
    shown = {"text", "muted", "input", "training", "together", "gained", "before", "band0", "band1", "band2", *PHASES}
    for theme in ({name: light for name, light, _ in colors}, {name: dark for name, _, dark in colors}):
        for ground in (theme["card"], theme["page"]):
            for name in shown:
                low, high = sorted((luminance(theme[name]), luminance(ground)))
                assert (high + 0.05) / (low + 0.05) >= 4.5, name


def test_numbers_are_written_as_people_read_them():
    assert [number(x) for x in (0, 0.0123, 0.5, 9.87, 45.67, 1234.5, 87_114, 4_980_545)] == [
        "0", "0.0123", "0.5", "9.87", "45.7", "1,234", "87,100", "4.98\N{NO-BREAK SPACE}M",
    ]  # fmt: skip
    written = [percent(0.0123), percent(0.41), signed(-0.07), duration(0.0123), duration(2e-5), scaled(2.26e7, "B")]
    assert [text.replace("\N{NO-BREAK SPACE}", " ") for text in written] == [
        "1.2 %", "41 %", "\N{MINUS SIGN}7 %", "12.3 ms", "20 µs", "22.6 MB",
    ]  # fmt: skip


def test_a_scale_holds_its_values_and_has_ticks_at_round_numbers():
    linear, decades = fit([300, 1000]), fit([20, 4000])
    assert not linear.logarithmic and linear.ticks == [0, 500, 1000] and linear(520) == 0.5
    assert decades.logarithmic and decades.ticks == [1, 10, 100, 1000, 10_000] and decades(100) == 0.5


def browse(page, *options):
    """What the browser prints, and what it logs."""
    folder = page.parent / "browser"
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={folder}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize(("theme", "card"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(23, 28, 36)")])
def test_a_browser_shows_all_of_it_in_the_width_of_phone_and_desktop(source, tmp_path, theme, card):
    probed = re.sub(r"<meta http-equiv[^>]*>", "", source).replace("</body>", PROBE + "</body>")
    (tmp_path / "probed.html").write_text(probed, encoding="utf-8")
    (tmp_path / "frames.html").write_text(FRAMES.replace("WIDTHS", ", ".join(map(str, WIDTHS))), encoding="utf-8")
    dumped, _ = browse(tmp_path / "frames.html", "--dump-dom", *["--force-dark-mode"] * (theme == "dark"))
    told = json.loads(re.search(r"<body>(.*)</body>", dumped)[1])
    assert told == {str(width): {"width": width, "card": card, "narrow": 0, "outside": 0} for width in WIDTHS}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_has_nothing_to_complain_of_and_draws_the_page(source, tmp_path):
    (tmp_path / "page.html").write_text(source, encoding="utf-8")
    picture = tmp_path / "page.png"
    _, logged = browse(tmp_path / "page.html", f"--screenshot={picture}", "--window-size=1280,900")
    assert "CONSOLE" not in logged
    from PIL import Image

    with Image.open(picture) as drawn:
        assert drawn.size == (1280, 900) and len(drawn.convert("RGB").getcolors(1 << 24)) > 100


def test_command_writes_page_and_trace(tiny, tmp_path, one_torch_thread):
    page, trace = tmp_path / "page.html", tmp_path / "trace.json"
    options = "--batch-size 2 --threads 1 --device cpu --seconds 1 --precision float32 --crop-size 64".split()
    command = ["profile", str(tiny.root), *options, "--html", str(page), "--trace", str(trace)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    said = result.stdout.splitlines()[0]
    assert said in Page(page.read_text(encoding="utf-8")).text()
    written = json.loads(trace.read_text(encoding="utf-8"))
    assert written["otherData"]["verdict"] == said
    # A slow machine is measured for a few steps only, and the first of them are left out.
    assert sum(event["name"].startswith("step ") for event in written["traceEvents"]) >= FEW_STEPS


def test_a_missing_folder_is_told_before_anything_is_measured(tiny, tmp_path):
    result = CliRunner().invoke(main, ["profile", str(tiny.root), "--html", str(tmp_path / "none" / "page.html")])
    assert result.exit_code == 1
    assert result.stderr == f"Error: {tmp_path}/none/page.html: there is no folder {tmp_path}/none; make it, or choose another\n"
