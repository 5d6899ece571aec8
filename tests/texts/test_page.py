"""The page of an explanation: what is in it, and what a person sees and does with it in a
browser.
"""

import html
import json
import re
import shutil
import time
from pathlib import Path

import pytest

from landmark.data.sources import Source
from landmark.texts.explain import explain
from landmark.texts.explanation import Explanation, Step
from landmark.texts.page import LEAST
from landmark.texts.passages import Span
from tiny import tiny_landmark

NASTY = (
    "</script><b>bold</b> &amp; <!-- \"q\" 's' ]]> \r\n\tcarriage\rreturn 😀 漢字 <img src=x "
    "onerror=alert(1)>\n"
)
FILLED = "The road went on between the hedges. " * 200
SOURCES = (
    Source("one.txt", "\nbegin " + FILLED + NASTY + FILLED),
    Source("<i>two", "near " + FILLED + "end\n"),
)
WHOLE = "".join(source.text for source in SOURCES)
AT = WHOLE.index(NASTY)
BORDER = len(SOURCES[0].text)


def block(number, begin, end, weight):
    return Span(number, begin, end, weight)


STEPS = (
    Step(
        " 4",
        (
            block(0, 0, 60, 0.02),
            block(9, AT, AT + len(NASTY), 0.4),
            block(10, AT + len(NASTY), AT + 300, 0.1),
        ),
    ),
    Step("", (block(0, 0, 60, 0.01), block(20, BORDER - 30, BORDER + 40, 0.3))),
    Step("</script>é", (block(30, len(WHOLE) - 50, len(WHOLE), 0.05),)),
    Step("\n", ()),
)
EXPLANATION = Explanation(SOURCES, " What is <b>x</b>? It is", " 4</script>é\n", STEPS)


def test_the_page_holds_the_text_and_names_nothing_outside():
    page = EXPLANATION.html()
    for source in SOURCES:
        for part in re.split(r"[\r\n]", source.text):
            assert html.escape(part[:20]) in page
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|src=(?!x )|@@", page.replace(html.escape(NASTY), "")
    )
    data = page.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["tokens"] == [step.token for step in STEPS]
    assert page.count("</script>") == 2, "of the data and of the script; those of the text are text"


def test_a_page_is_not_much_larger_than_its_text():
    explanation = large()
    assert len(explanation.html()) < len(explanation.sources[0].text) + 40 * 8000 + 100_000


def large():
    """500,000 characters in 8,000 blocks, all of them read."""
    text = "It was a dark and stormy night; but no matter." * 12_000
    size = 63
    text = text[:500_000]
    spans = [block(n, n * size, min((n + 1) * size, len(text)), 1e-3) for n in range(7936)]
    steps = [Step(str(n), (*spans[n::8], block(7936, 499_968, 500_000, 0.2))) for n in range(8)]
    return Explanation((Source("large.txt", text),), "?", "01234567", tuple(steps))


BROWSERS = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip(
        "playwright.sync_api", reason="expected playwright: make setup installs it"
    )
    with api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = next(filter(None, map(shutil.which, BROWSERS)), own if Path(own).is_file() else None)
        if path is None:
            pytest.skip(
                "no Chromium here to look at the page with: apt-get install "
                "chromium-headless-shell, or .venv/bin/playwright install chromium"
            )
        started = playwright.chromium.launch(executable_path=path)
        yield started
        started.close()


class Visit:
    """A page opened from disk without a network; ends with what it asked for and complained of."""

    def __init__(self, browser, folder, page, **context):
        file = folder / "page.html"
        file.write_text(page, encoding="utf-8", newline="")
        self.context = browser.new_context(offline=True, **context)
        self.page = self.context.new_page()
        self.trouble = []
        self.page.on("request", lambda request: self.asked(request.url, file))
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on(
            "dialog", lambda dialog: (self.trouble.append(dialog.message), dialog.dismiss())
        )
        self.page.goto(file.as_uri())

    def asked(self, url, file):
        if url not in (file.as_uri(), "data:,"):
            self.trouble.append(url)

    def hot(self):
        """The text that has heat: neighbouring pieces joined."""
        script = "all => all.map(piece => [piece.classList.contains('hot'), piece.textContent])"
        return joined(self.page.eval_on_selector_all(".text > span", script))

    def chosen(self):
        return self.page.eval_on_selector_all(
            "#tokens [aria-pressed=true]", "all => all.map(one => one.textContent)"
        )

    def passages(self):
        script = (
            "all => all.map(one => [one.querySelector('em').textContent, "
            "one.querySelector('b').textContent])"
        )
        return self.page.eval_on_selector_all("#passages button", script)

    def in_view(self, text):
        """Whether the piece that begins with this text lies below the header and inside the
        window.
        """
        return self.page.evaluate(
            """text => {
                const pieces = [...document.querySelectorAll('.text > span')];
                const piece = pieces.find(one => one.textContent.startsWith(text));
                const top = piece.getBoundingClientRect().top;
                const header = document.querySelector('header').getBoundingClientRect();
                return top >= header.bottom && top < innerHeight;
            }""",
            text,
        )


def joined(pieces):
    runs = []
    before = False
    for is_hot, text in pieces:
        if is_hot and before:
            runs[-1] += text
        elif is_hot:
            runs.append(text)
        before = is_hot
    return runs


@pytest.fixture
def visit(browser, tmp_path):
    """Opens a page; afterwards nothing was asked of the network, and nothing was complained of."""
    visits = []

    def call(explanation=EXPLANATION, **context):
        visits.append(Visit(browser, tmp_path, explanation.html(), **context))
        return visits[-1]

    yield call
    for each in visits:
        each.context.close()
        assert each.trouble == []


def test_what_a_page_asks_for_or_complains_of_is_noticed(browser, tmp_path):
    page = EXPLANATION.html()
    mistakes = {
        "request": re.sub("<meta http-equiv[^>]*>", "", page).replace(
            "<main>", "<img src='http://127.0.0.1:9/a'><main>"
        ),
        "refused by the page itself": page.replace(
            "<main>", "<img src='http://127.0.0.1:9/a'><main>"
        ),
        "error": page.replace("show(0);", "show(0); nothing.at.all"),
    }
    for name, mistaken in mistakes.items():
        seen = Visit(browser, tmp_path, mistaken)
        seen.context.close()
        assert seen.trouble != [], name


def test_the_text_is_shown_as_it_is(visit):
    page = visit().page
    assert page.eval_on_selector_all(".text", "all => all.map(one => one.textContent)") == [
        s.text for s in SOURCES
    ]
    assert page.locator(".text b, .text i, .text img").count() == 0
    assert page.locator("h1").text_content() == "What is <b>x</b>? It is"
    assert page.locator("section h2").all_text_contents() == ["one.txt", "<i>two"]


HOT = [
    [WHOLE[:60], WHOLE[AT : AT + 300]],
    [WHOLE[:60], WHOLE[BORDER - 30 : BORDER + 40]],
    [WHOLE[-50:]],
    [],
]
ALL = [WHOLE[:60], WHOLE[AT : AT + 300], WHOLE[BORDER - 30 : BORDER + 40], WHOLE[-50:]]


def test_the_arrow_keys_step_through_the_tokens(visit):
    seen = visit()
    assert (seen.chosen(), seen.hot()) == (["all"], ALL)
    shown = ["4", "…", "</script>é", "↵"]
    for token, hot in zip(shown, HOT, strict=True):
        seen.page.keyboard.press("ArrowRight")
        assert (seen.chosen(), seen.hot()) == ([token], hot)
    seen.page.keyboard.press("ArrowRight")
    assert seen.chosen() == ["↵"], "the last stays"
    for token in ["</script>é", "…", "4", "all", "all"]:
        seen.page.keyboard.press("ArrowLeft")
        assert seen.chosen() == [token]
    assert seen.hot() == ALL


def test_a_token_is_clicked(visit):
    seen = visit()
    seen.page.get_by_role("button", name="Token 2: …").click()
    assert (seen.chosen(), seen.hot()) == (["…"], HOT[1])
    seen.page.keyboard.press("ArrowLeft")
    assert seen.page.evaluate("document.activeElement.textContent") == "4", "the focus goes along"
    seen.page.get_by_role("button", name="all").click()
    assert (seen.chosen(), seen.hot()) == (["all"], ALL)


def test_it_says_how_much_was_read(visit):
    seen = visit()
    status = seen.page.get_by_role("status")
    assert "The whole answer, “4</script>é”: 22\u00a0% of the attention" in status.text_content()
    seen.page.keyboard.press("ArrowRight")
    assert "Token 1 of 4, “4”: 52\u00a0% of the attention" in status.text_content()
    assert "48\u00a0% to what is seen anyway" in status.text_content()


def test_the_strongest_passage_is_listed_first_and_in_view(visit):
    seen = visit(viewport={"width": 900, "height": 500})
    seen.page.keyboard.press("ArrowRight")
    lines = WHOLE[:AT].count("\n") + 1
    assert seen.passages() == [
        [f"one.txt, line {lines}", "40\u00a0%"],
        ["one.txt, line 1", "2.0\u00a0%"],
    ]
    assert seen.in_view(NASTY[:20]) and not seen.in_view("\nbegin")
    seen.page.locator("#passages button").nth(1).click()
    assert seen.in_view("\nbegin") and not seen.in_view(NASTY[:20])
    seen.page.keyboard.press("ArrowRight")
    lines = len(re.split(r"\r\n|\r|\n", SOURCES[0].text))
    border = [[f"one.txt, line {lines}", "30\u00a0%"], ["<i>two, line 1", "30\u00a0%"]]
    assert seen.passages() == [*border, ["one.txt, line 1", "1.0\u00a0%"]]


def test_it_is_used_by_the_keyboard_alone(visit):
    seen = visit(viewport={"width": 900, "height": 500})
    order = []
    for _ in range(3):
        seen.page.keyboard.press("Tab")
        order.append(seen.page.evaluate("document.activeElement.closest('[id]').id"))
    assert order == ["tokens", "passages", "passages"], "the tokens are one stop"
    seen.page.keyboard.press("Enter")
    assert seen.in_view(WHOLE[BORDER - 30 : BORDER - 10])


def test_alt_and_an_arrow_belong_to_the_browser(visit):
    seen = visit()
    seen.page.keyboard.press("Alt+ArrowRight")
    assert seen.chosen() == ["all"]


COLORS = """() => [...document.querySelectorAll('.text .hot')].map(piece => {
    const parts = color => color.match(/[\\d.]+/g).map(Number);
    const styles = [getComputedStyle(piece), getComputedStyle(document.body)];
    return styles.flatMap(style => [parts(style.backgroundColor), parts(style.color)]);
})"""


def luminance(color):
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (v / 255 for v in color)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_more_weight_is_more_heat_and_stays_legible(visit, scheme):
    seen = visit(color_scheme=scheme)
    seen.page.keyboard.press("ArrowRight")
    strengths = []
    for (*heat, alpha), ink, page, _ in (
        (background if len(background) == 4 else [*background, 1.0], ink, page, rest)
        for background, ink, page, rest in seen.page.evaluate(COLORS)
    ):
        strengths.append(alpha)
        behind = [alpha * a + (1 - alpha) * b for a, b in zip(heat, page, strict=False)]
        bright, dark = sorted((luminance(behind), luminance(ink[:3])), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5
    first, strongest, middle = strengths
    assert 0.1 < first < middle < strongest
    lightness = luminance(seen.page.evaluate(COLORS)[0][2])
    assert lightness > 0.9 if scheme == "light" else lightness < 0.1


@pytest.mark.parametrize("width", [320, 390, 800, 1600])
def test_nothing_is_wider_than_the_window(visit, width):
    seen = visit(viewport={"width": width, "height": 700})
    for _ in range(3):
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
        seen.page.keyboard.press("ArrowRight")


def test_a_large_text_is_stepped_through_without_waiting(visit):
    begun = time.perf_counter()
    seen = visit(large())
    for _ in range(8):
        seen.page.keyboard.press("ArrowRight")
        seen.chosen()
    assert len(seen.hot()) == 7936 / 8, "the last two are neighbours"
    assert time.perf_counter() - begun < 30, "a second or two on an idle machine"


def test_an_answer_of_no_tokens(visit):
    seen = visit(Explanation(SOURCES, "?", "", ()))
    assert (seen.chosen(), seen.hot(), seen.passages()) == (["all"], [], [])
    assert seen.page.locator("#passages").text_content() == "Nothing was retrieved."


def test_a_long_answer_leaves_room_for_the_text(visit):
    steps = tuple(Step(f" {number}", (Span(0, 0, 60, 0.1),)) for number in range(300))
    seen = visit(Explanation(SOURCES, "?", "", steps), viewport={"width": 390, "height": 700})
    for number in (300, 150, 0):
        seen.page.evaluate(f"show({number})")
        header, bar, token = (
            seen.page.locator(each).bounding_box()
            for each in ("header", "#tokens", "#tokens [aria-pressed=true]")
        )
        assert header["y"] == 0 and header["height"] < 350
        assert bar["y"] <= token["y"] and token["y"] + token["height"] <= bar["y"] + bar["height"]
        assert seen.in_view("\nbegin")


def test_the_heat_is_where_the_model_read(visit, tokenizer):
    explanation = explain(
        tiny_landmark(), tokenizer, "The grass is green. " * 60, " What is", max_new_tokens=4
    )
    seen = visit(explanation)
    text = explanation.sources[0].text
    for step in explanation.steps:
        seen.page.keyboard.press("ArrowRight")
        pieces = [
            (
                any(span.begin <= place < span.end and span.weight >= LEAST for span in step.spans),
                letter,
            )
            for place, letter in enumerate(text)
        ]
        assert seen.hot() == joined(pieces)
