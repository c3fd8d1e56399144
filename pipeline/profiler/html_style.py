"""The style of a profile's page: light and dark, phone to desktop, and on paper."""

# Colors contrast with what they stand on by 4.5 and more, in both themes; neighbors in a stack differ in lightness too, so
# that they are told apart without colors.
LIGHT = {
    "page": "#f4f5f7",
    "card": "#ffffff",
    "text": "#14181f",
    "muted": "#525c69",
    "line": "#d8dde4",
    "grid": "#e6e9ee",
    "track": "#e3e7ed",
    "wait": "#c2410c",
    "hand-over": "#4d3800",
    "forward": "#0b6fb8",
    "backward": "#123a63",
    "optimizer": "#9130f2",
    "step": "#0b6fb8",
    "rest": "#5f6b45",
    "other": "#616a77",
    "slowest": "#c6ccd6",
    "input": "#a84300",
    "training": "#0b6fb8",
    "together": "#123a63",
    "gained": "#137a54",
    "before": "#525c69",
    "band0": "#137a54",
    "band1": "#8f6000",
    "band2": "#8f1a1a",
}
DARK = {
    "page": "#0e1217",
    "card": "#171c24",
    "text": "#e8ecf2",
    "muted": "#a5afbd",
    "line": "#2d3541",
    "grid": "#262d38",
    "track": "#2b333f",
    "wait": "#ff8a4c",
    "hand-over": "#f6e3a1",
    "forward": "#4f9fe0",
    "backward": "#c5e2ff",
    "optimizer": "#ff4d90",
    "step": "#4f9fe0",
    "rest": "#a9c47a",
    "other": "#98a2b3",
    "slowest": "#46505f",
    "input": "#ff9a62",
    "training": "#4f9fe0",
    "together": "#c5e2ff",
    "gained": "#4cc38f",
    "before": "#98a2b3",
    "band0": "#4cc38f",
    "band1": "#e0b040",
    "band2": "#ff8a6b",
}


def variables(colors: dict[str, str]) -> str:
    return "".join(f"--{name}:{color};" for name, color in colors.items())


PARTS = ("wait", "hand-over", "forward", "backward", "optimizer", "step", "rest", "other")
FILLS = "".join(f".{name}{{fill:var(--{name});background:var(--{name})}}" for name in (*PARTS, "slowest"))
BANDS = "".join(
    f".band{n}{{fill:var(--band{n})}}.word{n}{{color:var(--band{n})}}.top{n}{{border-top-color:var(--band{n})}}" for n in range(3)
)

STYLE = f"""
:root{{color-scheme:light dark;{variables(LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{{variables(DARK)}}}}}
*{{box-sizing:border-box}}
html{{-webkit-text-size-adjust:100%}}
body{{margin:0;background:var(--page);color:var(--text);font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",
  "DejaVu Sans",sans-serif;overflow-wrap:break-word}}
main{{max-width:72rem;margin:0 auto;padding:clamp(.75rem,3vw,2rem);display:grid;gap:clamp(.75rem,2vw,1.25rem);
  grid-template-columns:repeat(2,minmax(0,1fr))}}
header,section{{background:var(--card);border:1px solid var(--line);border-radius:14px;min-width:0;
  padding:clamp(1rem,3vw,1.75rem)}}
header,.wide{{grid-column:1/-1}}
section{{align-self:start}}
h1{{font-size:clamp(1.45rem,1rem + 2.2vw,2.35rem);line-height:1.22;font-weight:700;letter-spacing:-.015em;margin:.6rem 0 1rem;
  text-wrap:pretty}}
h2{{font-size:1.25rem;line-height:1.3;margin:0 0 .35rem}}
h3{{font-size:1rem;margin:1.1rem 0 .4rem}}
p,ul,ol,dl,figure{{margin:0}}
ul,ol{{padding:0;list-style:none}}
code{{font:600 .95em ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}}
.eyebrow{{color:var(--muted);font-size:.875rem;margin-bottom:.6rem}}
.intro{{color:var(--muted);margin-bottom:1rem;max-width:62em}}
.note{{color:var(--muted);font-size:.875rem;line-height:1.4}}
.top{{border-top:6px solid}}
.confidence{{max-width:34rem;margin-bottom:1.4rem}}
.confidence .note{{margin-top:.3rem}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:1rem;margin-top:1.4rem;
  border-top:1px solid var(--line);padding-top:1.2rem}}
.tiles div{{display:flex;flex-direction:column-reverse;justify-content:flex-end}}
.tiles dd{{margin:0;font-size:1.75rem;line-height:1.2;font-weight:700;font-variant-numeric:tabular-nums}}
.tiles dt{{color:var(--muted);font-size:.875rem;line-height:1.35}}
.line{{display:flex;justify-content:space-between;align-items:baseline;gap:1rem;margin-bottom:.25rem}}
.figure{{font-weight:700;font-variant-numeric:tabular-nums;white-space:nowrap}}
.ranked li+li{{margin-top:1rem}}
ol.ranked{{counter-reset:rank}}
ol.ranked>li{{position:relative;padding-left:2.2rem;counter-increment:rank}}
ol.ranked>li::before{{content:counter(rank);position:absolute;left:0;top:.05rem;width:1.5rem;height:1.5rem;border-radius:50%;
  background:var(--track);text-align:center;font-weight:700;font-size:.875rem;line-height:1.5rem}}
.ranked .note{{margin-top:.3rem}}
.tried{{border-top:1px solid var(--line);margin-top:1.2rem}}
.tried li+li{{margin-top:.5rem}}
.bars li+li{{margin-top:.7rem}}
.series{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1rem 2rem}}
svg{{display:block;overflow:visible}}
svg text{{fill:var(--muted);font-size:.75rem;font-variant-numeric:tabular-nums}}
.axis{{margin-top:4px}}
.bars+.axis+.note{{margin-top:.4rem}}
.bar{{rx:3px}}
.input{{fill:var(--input)}}.training{{fill:var(--training)}}.together{{fill:var(--together)}}
.track{{fill:var(--track);rx:4px}}
.sure,.filled{{fill:var(--training);rx:4px}}
.lost{{fill:var(--wait);rx:4px}}
.before{{fill:var(--before)}}.gained{{fill:var(--gained)}}
.grid{{stroke:var(--grid)}}
.spread{{stroke:var(--text);stroke-width:1.5}}
.halo{{stroke:var(--card);stroke-width:5}}
.limit{{stroke:var(--text);stroke-width:3}}
.reference{{stroke:var(--muted);stroke-width:1.5;stroke-dasharray:4 3}}
.stalled{{stroke:var(--wait);stroke-width:2.5}}
.late{{fill:var(--track)}}
.spark{{fill:none;stroke:var(--training);stroke-width:1.75;vector-effect:non-scaling-stroke;stroke-linejoin:round}}
.hovered{{fill:transparent}}
.hovered rect:hover{{fill:var(--text);fill-opacity:.25}}
{FILLS}{BANDS}
.piece{{stroke:var(--card);stroke-width:1.5}}
.legend{{display:flex;flex-wrap:wrap;gap:.3rem 1.4rem;font-size:.9375rem;margin-bottom:1rem}}
.swatch{{display:inline-block;width:.8rem;height:.8rem;border-radius:3px;margin-right:.4rem}}
figure+figure{{margin-top:1rem}}
figcaption{{margin-bottom:.35rem}}
section figcaption{{font-weight:600;font-size:.9375rem}}
.timeline{{display:grid;grid-template-columns:56px minmax(0,1fr)}}
figure .note{{margin-top:.5rem}}
.stage{{display:grid;grid-template-columns:12rem minmax(0,1fr) 6rem 6.5rem 11rem;gap:.2rem 1.2rem;align-items:start;
  padding:.55rem 0;border-top:1px solid var(--line)}}
.stage.heads{{border:0;color:var(--muted);font-size:.8125rem;padding-top:0}}
.stage.ruler{{padding:0;border-top:0}}
.stage .name{{display:flex;justify-content:space-between;gap:.6rem;line-height:1.35}}
.stage .rate{{grid-column:2}}.stage .busy{{grid-column:3;padding-top:9px}}.stage .queue{{grid-column:4;padding-top:9px}}
.stage .quantiles{{grid-column:5;font-size:.8125rem;padding-top:3px;font-variant-numeric:tabular-nums}}
.stage .note{{margin-top:.2rem;font-size:.8125rem}}
.narrow{{display:none}}
.facts{{display:grid;gap:0}}
.facts div{{display:flex;justify-content:space-between;gap:1rem;padding:.3rem 0;border-top:1px solid var(--line)}}
.facts dt{{color:var(--muted)}}
.facts dd{{margin:0;text-align:right;font-variant-numeric:tabular-nums}}
details{{margin-top:1rem}}
summary{{cursor:pointer;color:var(--muted);font-size:.875rem;width:max-content}}
.scroll{{overflow-x:auto;margin-top:.5rem}}
table{{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;overflow-wrap:normal;min-width:100%}}
caption{{text-align:left;color:var(--muted);padding-bottom:.3rem}}
th,td{{text-align:right;padding:.3rem .6rem;border-top:1px solid var(--line);vertical-align:top}}
th:first-child,td:first-child{{text-align:left;padding-left:0}}
th{{font-weight:600}}
footer{{max-width:72rem;margin:0 auto;padding:0 clamp(.75rem,3vw,2rem) 2rem;color:var(--muted);font-size:.875rem}}
:focus-visible{{outline:3px solid var(--training);outline-offset:2px}}
@media screen and (max-width:56rem){{
  main{{grid-template-columns:minmax(0,1fr)}}
  .stage{{grid-template-columns:1fr 1fr;padding:.8rem 0}}
  .stage.heads{{display:none}}
  .stage .name,.stage .rate,.stage .quantiles,.stage.ruler .axis{{grid-column:1/-1}}
  .stage .busy{{grid-column:1}}.stage .queue{{grid-column:2}}
  .narrow{{display:inline;color:var(--muted)}}
}}
@media print{{
  :root{{{variables(LIGHT)}}}
  html{{font-size:11px}}
  body{{background:none}}
  main{{padding:0;gap:0 2rem}}
  section{{grid-column:1/-1}}
  header,section{{border:0;border-bottom:1px solid var(--line);border-radius:0;padding:1rem 0}}
  header,li,figure,tr{{break-inside:avoid}}
  h2{{break-after:avoid}}
  *{{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
  details:not([open])::details-content{{content-visibility:visible;block-size:auto}}
  summary{{display:none}}
  .scroll{{overflow:visible}}
}}
"""
