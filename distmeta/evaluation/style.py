"""The report's HTML frame and its style sheet."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

STYLE = """
:root { color-scheme: light; --ink: #1d232b; --soft: #5b6572; --line: #e3e6ea; --method: #0072b2;
  --better: #00704f; --worse: #b34700;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 var(--sans); -webkit-text-size-adjust: 100%; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: clamp(1.7rem, 5vw, 2.4rem); line-height: 1.15; letter-spacing: -.02em; margin: .1em 0 .45em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.12rem; margin: 0 0 .5rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
.kicker { margin: 0; color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.lead { font-size: clamp(1.05rem, 2.6vw, 1.22rem); max-width: 46em; margin: 0; }
small { font-size: .78em; color: var(--soft); font-weight: 400; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); margin: 28px 0 36px;
  border-top: 2px solid var(--ink); border-bottom: 1px solid var(--line); }
.tiles div { padding: 12px 12px 14px 0; }
.tiles dt { color: var(--soft); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.5rem; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles dd small { display: block; font-size: .78rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 40px 48px;
  align-items: start; }
figure { margin: 0; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; max-width: 520px; overflow: visible; }
figure svg text { font-family: var(--sans) !important; }
figcaption, .note { color: var(--soft); font-size: .88rem; margin: 8px 0 0; max-width: 60em; }
section { margin-top: 52px; padding-top: 18px; border-top: 1px solid var(--line); }
.wide { overflow-x: auto; margin: 0 0 22px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; width: 100%; }
caption { text-align: left; font-weight: 600; padding: 0 0 6px; }
th, td { text-align: right; padding: 6px 10px; white-space: nowrap; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { color: var(--soft); font-weight: 500; font-size: .82rem; border-bottom: 1px solid #aab2bc; }
th:first-child { text-align: left; padding-left: 0; font-weight: 500; position: sticky; left: 0; background: #fff; }
td small { display: block; }
.start { padding-left: 30px; }
.note + .wide { margin-top: 14px; }
tr.groups th { text-align: center; border-bottom: 0; padding-bottom: 0; color: var(--ink); position: static; }
thead th { vertical-align: bottom; }
.tight th:not(:first-child), .tight td { padding-left: 5px; padding-right: 5px; }
.tight .start { padding-left: 20px; }
tr.groups td { border: 0; padding: 0; }
tr.mine th, tr.mine td { color: var(--method); font-weight: 600; }
.better { color: var(--better); }
.worse { color: var(--worse); }
.provenance dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0; font-size: .92rem; }
.provenance dt { color: var(--soft); }
.provenance dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .82rem; }
pre { background: #f6f7f9; border-radius: 6px; padding: 14px 16px; margin: 0; overflow-x: auto; line-height: 1.5; }
@media (max-width: 560px) {
  main { padding: 24px 16px 48px; }
  .provenance dl { grid-template-columns: 1fr; }
  .provenance dt { margin-top: 8px; }
}
@media print {
  main { max-width: none; padding: 0; }
  body { font-size: 11pt; }
  .wide { overflow: visible; }
  table { font-size: 8.5pt; }
  th, td { padding: 3px 6px; }
  tr, .tiles { break-inside: avoid; }
  h2, caption { break-after: avoid; }
  .figures { grid-template-columns: 1fr 1fr; gap: 24px; }
  pre { white-space: pre-wrap; }
}
"""
