"""One style sheet: colours are translucent over the theme's own, so that light and dark both work."""

CSS = """
<style>
:root { --sl-pos: 15,150,135; --sl-neg: 214,96,20; --sl-line: 128,138,150; --sl-held: 82,105,224; }
.block-container, [data-testid="stMainBlockContainer"] { padding-top: 2.6rem; max-width: 1280px; }
[data-testid="stHeader"] { background: transparent; }
[data-testid="stSidebar"] { min-width: 210px; max-width: 230px; }
.sl-foot { font-size: .78rem; opacity: .75; line-height: 1.35; font-weight: 600; }
.sl-foot span { font-weight: 400; opacity: .8; word-break: break-all; }
.sl-h1 { font-size: 1.55rem; font-weight: 650; letter-spacing: -.01em; margin: 0; line-height: 1.25; }
.sl-h1 small { font-size: .9rem; font-weight: 400; opacity: .65; margin-left: .5rem; letter-spacing: 0; }
.sl-h2 { font-size: .95rem; font-weight: 620; margin: .9rem 0 .35rem; }
.sl-h2 small { font-weight: 400; opacity: .62; font-size: .8rem; margin-left: .4rem; }
.sl-note { font-size: .84rem; opacity: .68; line-height: 1.45; }
.sl-stats { display: flex; flex-wrap: wrap; gap: .4rem 2rem; margin: .35rem 0 .2rem; }
.sl-stat b { display: block; font-size: 1.12rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.sl-stat span { font-size: .76rem; opacity: .65; }
.sl-badge { display: inline-block; font-size: .74rem; padding: .06rem .5rem; border-radius: 1rem;
  border: 1px solid rgba(var(--sl-line),.4); margin: 0 .3rem .2rem 0; white-space: nowrap; }
.sl-badge.warn { border-color: rgba(var(--sl-neg),.65); background: rgba(var(--sl-neg),.12); }
.sl-badge.live { border-color: rgba(var(--sl-pos),.65); background: rgba(var(--sl-pos),.14); }
.sl-badge.held { border-color: rgba(var(--sl-held),.6); background: rgba(var(--sl-held),.13); }
.sl-tok { display: inline-block; font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace;
  font-size: .84rem; padding: 0 .35rem; border-radius: .3rem; background: rgba(var(--sl-line),.14);
  white-space: pre; max-width: 15rem; overflow: hidden; text-overflow: ellipsis; vertical-align: bottom; }
.sl-tok i, .sl-text i { font-style: normal; opacity: .45; }
.sl-bars { width: 100%; border-collapse: collapse; font-size: .84rem; }
.sl-bars td { padding: .1rem .25rem; border: none; }
.sl-bars td.num { text-align: right; font-variant-numeric: tabular-nums; width: 3.6rem; opacity: .85; }
.sl-bars td.bar { width: 34%; }
.sl-bar { height: .55rem; border-radius: .2rem; background: rgba(var(--sl-pos),.6); min-width: 1px; }
.sl-bar.neg { background: rgba(var(--sl-neg),.6); }
.sl-two { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.4rem; }
.sl-ex { display: grid; grid-template-columns: 4.6rem 1fr; gap: .7rem; padding: .42rem 0;
  border-bottom: 1px solid rgba(var(--sl-line),.18); align-items: start; }
.sl-ex .side { text-align: right; font-variant-numeric: tabular-nums; font-size: .84rem; line-height: 1.5; }
.sl-ex .side .sl-badge { font-size: .64rem; padding: 0 .36rem; margin: 0; }
.sl-ex summary { list-style: none; cursor: pointer; }
.sl-ex summary::-webkit-details-marker { display: none; }
.sl-ex details[open] .snip { display: none; }
.sl-ex details:not([open]) .less { display: none; }
.sl-ex .less { font-size: .74rem; opacity: .55; }
.sl-text { font-size: .92rem; line-height: 1.72; white-space: pre-wrap; overflow-wrap: anywhere; }
.sl-text s { text-decoration: none; opacity: .42; }
.sl-text b { font-weight: 400; border-radius: .22rem; padding: .1rem 0; }
.sl-text b.at { box-shadow: inset 0 -2px 0 currentColor; }
.sl-big { font-size: 1.08rem; line-height: 2.15; }
.sl-card .sl-h1 { font-size: 1.05rem; word-break: break-word; }
.sl-card .sl-note { margin-bottom: .3rem; word-break: break-word; }
.sl-table { width: 100%; border-collapse: collapse; font-size: .85rem; }
.sl-table th { text-align: right; font-weight: 600; padding: .3rem .6rem; white-space: nowrap;
  border-bottom: 1px solid rgba(var(--sl-line),.45); }
.sl-table td { text-align: right; padding: .24rem .6rem; white-space: nowrap; border: none;
  border-bottom: 1px solid rgba(var(--sl-line),.15); font-variant-numeric: tabular-nums; }
.sl-table th:first-child, .sl-table td:first-child { text-align: left; }
.sl-table td small { opacity: .55; font-size: .76rem; }
.sl-table td.own { background: rgba(var(--sl-pos),.07); }
.sl-table a { color: inherit; text-decoration: none; border-bottom: 1px dotted rgba(var(--sl-line),.8); }
.sl-table a:hover { border-bottom-style: solid; }
.sl-scroll { overflow-x: auto; }
.sl-table td.left, .sl-table th.left { text-align: left; }
</style>
"""
