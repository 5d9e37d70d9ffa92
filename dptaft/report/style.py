"""The style sheet of a report: screens, phones and paper, light and dark."""

from __future__ import annotations

STYLE = r"""
:root {
  --paper: #ffffff; --panel: #f6f7f9; --ink: #1c2430; --soft: #5a6675; --line: #d5dae1;
  --first: #1f5fbf; --second: #c4661f; --wash: #dde8f7;
  --good: #14683f; --good-bg: #e0f2e8; --warn: #7a4b00; --warn-bg: #fdf0d3; --bad: #97201a; --bad-bg: #fbe3e1;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12161c; --panel: #1b2129; --ink: #e8ecf1; --soft: #9ba7b5; --line: #37414e;
    --first: #74a9ff; --second: #f0a063; --wash: #1d2d45;
    --good: #7fd6a6; --good-bg: #16352a; --warn: #f0c36a; --warn-bg: #3a2f14; --bad: #ff9d95;
    --bad-bg: #43201f;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 0.94rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.1rem 0 0.2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 0.6rem; }
h3 { font-size: 0.92rem; margin: 1rem 0 0.3rem; }
p { margin: 0 0 0.6rem; overflow-wrap: anywhere; }
section { margin-top: 1.6rem; }
.eyebrow { text-transform: uppercase; letter-spacing: 0.08em; font-size: 0.75rem;
  color: var(--soft); margin: 0; }
.meta { color: var(--soft); margin: 0; overflow-wrap: anywhere; }
.meta span { display: inline-block; margin-left: 0.4rem; }
.claim { border-left: 4px solid var(--first); padding: 0.2rem 0 0.2rem 1rem; }
.claim p:first-child { font-size: 1.2rem; line-height: 1.45; margin: 0; max-width: 54rem; }
.claim.none { border: 2px solid var(--bad); background: var(--bad-bg); padding: 1rem; border-radius: 8px; }
.claim.none p { color: var(--bad); font-weight: 600; }
.formal { color: var(--soft); margin: 0.5rem 0 0; font-size: 0.9rem; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 0.8rem; }
.numbers div { background: var(--panel); border-radius: 8px; padding: 0.75rem 0.9rem; }
.numbers span { display: block; }
.numbers .label { color: var(--soft); font-size: 0.85rem; }
.numbers .value { font-size: 1.75rem; line-height: 1.2; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.numbers .words { color: var(--soft); font-size: 0.82rem; }
.caveats { background: var(--warn-bg); color: var(--warn); border-radius: 8px; padding: 0.8rem 1rem; }
.caveats h2 { margin-bottom: 0.3rem; }
ul { margin: 0; padding-left: 1.15rem; }
li { margin: 0.15rem 0; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem 1.5rem; }
figure { margin: 0; }
figure h3 { margin: 0 0 0.3rem; }
figure svg { display: block; width: 100%; height: auto; font-family: inherit; }
figcaption { color: var(--soft); font-size: 0.85rem; }
.risks dl { margin: 0; }
.risks dl > div {
  display: grid; grid-template-columns: 13rem 4.5rem 6rem 1fr; gap: 0 1rem; align-items: center;
  padding: 0.4rem 0; border-top: 1px solid var(--line);
}
dt, dd, th { overflow-wrap: anywhere; }
dt { font-weight: 600; }
dd { margin: 0; }
.amount { text-align: right; font-variant-numeric: tabular-nums; font-weight: 600; }
.bar { height: 8px; background: var(--panel); border-radius: 4px; overflow: hidden; }
.bar i { display: block; height: 100%; min-width: 2px; background: var(--first); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 0 2rem;
  align-items: start; }
.flow { columns: 24rem 2; column-gap: 2rem; margin-top: 1.6rem; }
.flow section { margin: 0 0 1.6rem; break-inside: avoid; }
table { width: 100%; border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: 0.38rem 0.6rem 0.38rem 0;
  border-top: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; font-size: 0.85rem; border-top: 0; padding-top: 0; }
tbody th { font-weight: 500; color: var(--soft); width: 42%; }
td { overflow-wrap: anywhere; }
.scope td:last-child { white-space: nowrap; width: 1%; padding-right: 0; }
.where { display: block; color: var(--soft); font-size: 0.8rem; }
.pill { display: inline-block; padding: 0.05rem 0.55rem; border-radius: 1rem; font-size: 0.82rem;
  overflow-wrap: normal; }
.pill.good { background: var(--good-bg); color: var(--good); }
.pill.warn { background: var(--warn-bg); color: var(--warn); }
.pill.bad { background: var(--bad-bg); color: var(--bad); }
.pill.quiet { background: var(--panel); color: var(--soft); }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.88em;
  overflow-wrap: anywhere; }
.hash { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.78rem;
  overflow-wrap: anywhere; }
@media (max-width: 34rem) {
  main { padding: 1.2rem 1rem 2rem; }
  .numbers { grid-template-columns: 1fr 1fr; gap: 0.6rem; }
  .numbers .value { font-size: 1.4rem; }
  .columns, .plots { grid-template-columns: minmax(0, 1fr); }
  .flow { columns: 1; }
  .scope td:last-child { white-space: normal; width: 34%; }
  .meta span { display: block; margin: 0; }
  .risks dl > div { grid-template-columns: 1fr auto; }
  .risks .bar { grid-column: 1 / -1; margin: 0.25rem 0; }
  .risks dd:last-child { grid-column: 1 / -1; }
  .claim p:first-child { font-size: 1.08rem; }
}
@page { size: A4; margin: 13mm; }
@media print {
  :root {
    --paper: #ffffff; --panel: #f3f4f6; --ink: #111111; --soft: #444c56; --line: #c5cad1;
    --first: #1f5fbf; --second: #c4661f; --wash: #dde8f7;
    --good: #14683f; --good-bg: #e0f2e8; --warn: #7a4b00; --warn-bg: #fdf0d3; --bad: #97201a;
    --bad-bg: #fbe3e1;
  }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  html { font-size: 10px; }
  body { line-height: 1.4; }
  main { max-width: none; padding: 0; }
  section { margin-top: 1.1rem; }
  .flow { columns: 2; column-gap: 1.5rem; margin-top: 1.1rem; }
  .flow section { margin-bottom: 1rem; }
  .plots { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .columns { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 1.5rem; }
  .risks dl > div { grid-template-columns: 15rem 5rem 7rem 1fr; padding: 0.2rem 0; }
  .numbers { grid-template-columns: repeat(4, 1fr); }
  .numbers .value { font-size: 1.5rem; }
  th, td { padding-top: 0.18rem; padding-bottom: 0.18rem; }
  figure, tr, .risks dl > div, .caveats, .numbers div { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""
