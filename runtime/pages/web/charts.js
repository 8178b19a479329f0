// Draws the charts of a page with uPlot, which stands before this: each <figure class="chart"> has its figures as JSON.
(() => {
  "use strict";
  const root = document.documentElement;
  const darkness = matchMedia("(prefers-color-scheme: dark)");
  // distances between places on an axis of whole numbers
  const WHOLE = Array.from({ length: 46 }, (_, place) => [1, 2, 5][place % 3] * 10 ** Math.floor(place / 3));
  const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
  const DASHES = { "--": [7, 4], "-.": [7, 3, 2, 3], ":": [2, 3] };
  const MOST_TOLD = 6; // lines whose values a readout names; of more it names the nearest
  const charts = [];

  function el(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function isDark() {
    return root.dataset.scheme ? root.dataset.scheme === "dark" : darkness.matches;
  }

  const probe = document.body.appendChild(el("span", { hidden: "" }));
  /** Return what canvas and CSS take: of a name in page.css, of a place between 0 and 1 on a ramp, or of "#rrggbb". */
  function colour(name) {
    if (typeof name === "number") return `hsl(${270 - 210 * name} 62% ${isDark() ? 68 - 6 * name : 30 + 12 * name}%)`;
    probe.style.color = name.startsWith("#") ? name : `var(--${name})`;
    return getComputedStyle(probe).color;
  }

  /** Return a number for an axis: 25k, 0.3, 3e-4, 2e15. */
  function short(value) {
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e15)) return Number(value.toPrecision(3)).toExponential().replace("+", "");
    for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (size >= 10 * unit || (size >= unit && unit > 1e3)) return +(value / unit).toPrecision(4) + letter;
    return String(+value.toPrecision(6));
  }

  /** Return round places of a logarithmic axis: 1, 2 and 5 of each power of ten, or 1 alone where these are many. */
  function logPlaces(low, high) {
    const decades = Math.log10(high / low);
    if (decades < 0.5) { // as on a linear axis
      const power = 10 ** Math.floor(Math.log10((high - low) / 3));
      const step = [1, 2, 5, 10].find((each) => (high - low) / (each * power) <= 6) * power;
      return Array.from({ length: 8 }, (_, index) => (Math.ceil(low / step) + index) * step).filter((at) => at <= high);
    }
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const digit of decades > 2.5 ? [1] : [1, 2, 5]) found.push(+(digit * 10 ** power).toPrecision(3));
    return found.filter((at) => at >= low && at <= high);
  }

  function exact(value) {
    if (value === null) return "unknown";
    return Number.isInteger(value) ? value.toLocaleString("en") : String(+value.toPrecision(6));
  }

  /** Return rows with all lines: the n-th point of a line at an x shares a row with the n-th of other lines there. */
  function align(lines, quantity) {
    const rows = new Map();
    lines.forEach((line, number) => {
      const seen = new Map();
      line.x[quantity].forEach((x, index) => {
        const count = seen.get(x) ?? 0;
        seen.set(x, count + 1);
        const key = `${x} ${count}`;
        if (!rows.has(key)) rows.set(key, { x, count, at: Array(lines.length).fill(null) });
        rows.get(key).at[number] = index;
      });
    });
    return [...rows.values()].sort((one, other) => one.x - other.x || one.count - other.count);
  }

  function shape(context, marker, x, y, radius) {
    context.beginPath();
    if (marker === "x") {
      for (const side of [-1, 1]) {
        context.moveTo(x - radius, y - side * radius);
        context.lineTo(x + radius, y + side * radius);
      }
      context.stroke();
      return;
    }
    const corners = { D: 4, "*": 10, s: 4 }[marker];
    if (!corners) context.arc(x, y, radius, 0, 2 * Math.PI);
    for (let corner = 0; corner < corners; corner++) {
      const angle = (2 * Math.PI * (corner + (marker === "s" ? 0.5 : 0))) / corners - Math.PI / 2;
      const reach = radius * (marker === "*" ? (corner % 2 ? 0.75 : 1.8) : 1.35);
      context.lineTo(x + reach * Math.cos(angle), y + reach * Math.sin(angle));
    }
    context.fill();
  }

  /** Lines, dots, intervals and bands over x. */
  class Lines {
    constructor(chart) {
      this.chart = chart;
      this.spec = chart.spec;
      this.colours = this.spec.lines.map((line) => colour(line.color));
      this.rows = align(this.spec.lines, chart.quantity).filter((row) => !chart.log.x || row.x > 0);
    }

    get data() {
      const ok = (y) => y !== undefined && (!this.chart.log.y || y > 0);
      const column = (line, number) =>
        this.rows.map((row) => (row.at[number] !== null && ok(line.y[row.at[number]]) ? line.y[row.at[number]] : null));
      return [this.rows.map((row) => row.x), ...this.spec.lines.map(column)];
    }

    get series() {
      return this.spec.lines.map((line, number) => ({
        label: line.name, stroke: this.colours[number], width: line.width, dash: DASHES[line.line], spanGaps: true,
        alpha: line.alpha, show: !this.chart.hidden.has(number), points: { show: false },
        paths: line.line ? undefined : () => null,
      }));
    }

    get axes() {
      const { ticks } = this.spec;
      const log = { splits: (u, axis, low, high) => logPlaces(low, high), filter: (u, splits) => splits };
      const { x, y } = this.chart.log;
      const whole = this.spec.x[this.chart.quantity] === "step" ? { incrs: WHOLE } : {};
      if (!ticks || this.chart.quantity) return [x ? log : whole, y ? log : {}];
      const isLong = ticks.names.join("  ").length * 7 > this.chart.plot.clientWidth - 60;
      return [{
        splits: () => ticks.places, filter: (u, splits) => splits, values: () => ticks.names,
        rotate: isLong ? -35 : 0, size: isLong ? 76 : 36,
      }, y ? log : {}];
    }

    get scales() {
      const { log, spec, quantity } = this.chart;
      // uPlot asks for x first, then for y, and for x also when a part of it was chosen
      const x = (u, low, high) => (this.seen = whole(u, low, high));
      const whole = (u, low, high) => {
        if (low === null) return [null, null];
        const [first, last] = [u.data[0][0], u.data[0].at(-1)];
        if (low > first || high < last) return [low, high];
        [low, high] = [first, last];
        if (spec.span && !quantity) [low, high] = [Math.min(low, spec.span[0]), Math.max(high, spec.span[1])];
        const isTight = spec.lines.every((line) => line.line) && low < high;
        if (log.x) return [low / (isTight ? 1 : 1.15), high * (isTight ? 1 : 1.15)];
        const pad = isTight ? 0 : 0.04 * (high - low) || 0.5;
        return [low - pad, high + pad];
      };
      const y = () => {
        let [low, high] = [Infinity, -Infinity];
        const take = (value) => {
          if (value === undefined || !Number.isFinite(value) || (log.y && value <= 0)) return;
          [low, high] = [Math.min(low, value), Math.max(high, value)];
        };
        const sees = (at) => at >= this.seen[0] && at <= this.seen[1];
        spec.lines.forEach((line, number) => {
          if (this.chart.hidden.has(number)) return;
          line.x[quantity].forEach((at, index) => {
            if (sees(at)) [line.y, line.low ?? [], line.high ?? []].forEach((values) => take(values[index]));
          });
        });
        if (!quantity)
          for (const band of spec.bands)
            band.x.forEach((at, index) => sees(at) && [band.low, band.high].forEach((values) => take(values[index])));
        if (low > high) return log.y ? [1, 10] : [0, 1];
        const factor = low === high ? 1.5 : (high / low) ** 0.05;
        if (log.y) return [low / factor, high * factor];
        if (spec.zero && low >= 0) return [0, high * 1.06 || 1];
        const pad = 0.06 * (high - low) || Math.abs(high) * 0.05 || 0.5;
        return [low - pad, high + pad];
      };
      return { x: { time: false, distr: log.x ? 3 : 1, range: x }, y: { distr: log.y ? 3 : 1, range: y } };
    }

    /** Return the row, of one line, that is nearest to the pointer; null where the line has not begun or has ended. */
    nearest(u, number) {
      const { left, top } = u.cursor;
      let [best, least] = [null, Infinity];
      const line = this.spec.lines[number - 1];
      const isScattered = !line.line;
      const at = line.x[this.chart.quantity];
      const ends = [at[0], at.at(-1)].map((x) => u.valToPos(x, "x"));
      if (!isScattered && (left < ends[0] - 4 || left > ends[1] + 4)) return null;
      u.data[number].forEach((value, index) => {
        if (value === null) return;
        const across = u.valToPos(u.data[0][index], "x") - left;
        const distance = isScattered ? Math.hypot(across, u.valToPos(value, "y") - top) : Math.abs(across);
        if (distance < least) [best, least] = [index, distance];
      });
      return best;
    }

    get dataIdx() {
      return (u, number, index) => (number === 0 || u.cursor.left < 0 ? index : this.nearest(u, number));
    }

    under(u, context) {
      const { quantity, spec } = this.chart;
      const at = (x, y) => [u.valToPos(x, "x", true), u.valToPos(y, "y", true)];
      for (const band of quantity ? [] : spec.bands) {
        context.fillStyle = colour(band.color);
        context.globalAlpha = 0.16;
        context.beginPath();
        const backwards = band.x.map((_, index) => band.x.length - 1 - index);
        band.x.forEach((x, index) => context.lineTo(...at(x, band.high[index])));
        backwards.forEach((index) => context.lineTo(...at(band.x[index], band.low[index])));
        context.fill();
        context.globalAlpha = 1;
      }
      const { top, height } = u.bbox;
      for (const mark of spec.marks)
        for (const x of mark.x[quantity] ?? []) {
          context.strokeStyle = context.fillStyle = colour(mark.color);
          context.lineWidth = devicePixelRatio;
          const place = u.valToPos(x, "x", true);
          context.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
          context.beginPath();
          context.moveTo(place, mark.tall ? top : top + height * 0.94);
          context.lineTo(place, top + height);
          context.stroke();
          context.setLineDash([]);
          shape(context, mark.marker, place, top + height - 6 * devicePixelRatio, 4 * devicePixelRatio);
        }
    }

    over(u, context) {
      const ratio = devicePixelRatio;
      this.spec.lines.forEach((line, number) => {
        if (this.chart.hidden.has(number)) return;
        context.strokeStyle = context.fillStyle = this.colours[number];
        context.globalAlpha = line.alpha;
        context.lineWidth = 1.4 * ratio;
        u.data[number + 1].forEach((value, row) => {
          if (value === null) return;
          const index = this.rows[row].at[number];
          const [x, y] = [u.valToPos(u.data[0][row], "x", true), u.valToPos(value, "y", true)];
          if (line.low && line.low[index] !== null && line.high[index] !== null)
            this.bar(context, x, x, ...[line.low, line.high].map((to) => u.valToPos(to[index], "y", true)));
          if (line.left && !this.chart.quantity)
            this.bar(context, ...[line.left, line.right].map((to) => u.valToPos(to[index], "x", true)), y, y);
          if (line.shades) context.fillStyle = colour(line.shades[index]);
          if (line.dots) shape(context, line.marker, x, y, (line.shades ? 6 : 3.5) * ratio);
        });
        context.globalAlpha = 1;
      });
    }

    bar(context, fromX, toX, fromY, toY) {
      const cap = 3 * devicePixelRatio;
      const [dx, dy] = fromX === toX ? [cap, 0] : [0, cap];
      context.beginPath();
      for (const [x, y] of [[fromX, fromY], [toX, toY]]) {
        context.moveTo(x - dx, y - dy);
        context.lineTo(x + dx, y + dy);
      }
      context.moveTo(fromX, fromY);
      context.lineTo(toX, toY);
      context.stroke();
    }

    /** Return what the readout says where the pointer is. */
    tell(u) {
      const { ticks, lines } = this.spec;
      const place = (x) => (ticks && ticks.places.includes(x) ? ticks.names[ticks.places.indexOf(x)] : exact(x));
      const name = this.spec.x[this.chart.quantity];
      let found = lines.map((line, number) => ({ line, number, row: u.cursor.idxs[number + 1] }))
        .filter(({ row, number }) => row !== null && row !== undefined && !this.chart.hidden.has(number));
      if (found.length > MOST_TOLD) {
        const far = ({ row, number }) => Math.hypot(u.valToPos(u.data[0][row], "x") - u.cursor.left,
          u.valToPos(u.data[number + 1][row], "y") - u.cursor.top);
        found = [found.reduce((best, each) => (far(each) < far(best) ? each : best))];
      }
      if (!found.length) return "";
      const near = ({ row }) => Math.abs(u.valToPos(u.data[0][row], "x") - u.cursor.left);
      const x = u.data[0][found.reduce((best, each) => (near(each) < near(best) ? each : best)).row];
      const told = found.map(({ line, number, row }) => {
        const index = this.rows[row].at[number];
        const spread = line.low ? ` (${exact(line.low[index])} to ${exact(line.high[index])})` : "";
        const own = u.data[0][row] === x ? "" : ` (at ${place(u.data[0][row])})`;
        return `${line.name} ${line.words ? line.words[index] : exact(line.y[index])}${spread}${own}`;
      });
      return `${name} ${place(x)}: ${told.join(", ")}`;
    }

    /** Move the pointer by so many rows; Infinity: to the last. */
    walk(u, by) {
      const last = u.data[0].length - 1;
      this.row = Math.max(0, Math.min(last, (this.row ?? (by > 0 ? -1 : last + 1)) + by));
      const number = u.data.findIndex((values, index) => index > 0 && values[this.row] !== null);
      const top = number < 0 ? 0 : u.valToPos(u.data[number][this.row], "y");
      u.setCursor({ left: u.valToPos(u.data[0][this.row], "x"), top });
    }
  }

  /** What each pipeline rank does when, as boxes. */
  class Timeline {
    constructor(chart) {
      this.chart = chart;
      this.spec = chart.spec;
      this.data = [this.spec.span, [null, null]];
      this.series = [{ show: false }];
      const { ranks } = this.spec;
      const number = () => Array.from({ length: ranks }, (_, rank) => rank + 0.5);
      this.axes = [{}, {
        splits: number, filter: (u, splits) => splits, grid: { show: false }, ticks: { show: false },
        values: (u, splits) => splits.map(Math.floor).map((rank) => (ranks > 24 && rank % 8 ? "" : `rank ${rank}`)),
      }];
      this.scales = { x: { time: false, range: (u, low, high) => [low, high] },
        y: { dir: -1, range: () => [0, ranks] } };
      this.dataIdx = (u, series, index) => index;
    }

    under(u, context) {
      context.fillStyle = colour("wash");
      for (let rank = 0; rank < this.spec.ranks; rank++) this.box(u, context, rank, ...this.spec.span, 0.1, 0.9);
    }

    box(u, context, rank, start, stop, from, to) {
      const [left, right] = [start, stop].map((x) => u.valToPos(x, "x", true));
      const [top, bottom] = [rank + from, rank + to].map((y) => u.valToPos(y, "y", true));
      const width = Math.max(devicePixelRatio, right - left - 0.7 * devicePixelRatio);
      context.fillRect(left, top, width, bottom - top);
      return [left + width / 2, (top + bottom) / 2, width];
    }

    over(u, context) {
      const ratio = devicePixelRatio;
      context.font = FONT.replace("12px", `${11 * ratio}px`);
      context.textAlign = "center";
      context.textBaseline = "middle";
      for (const [rank, start, stop, kind, label] of this.spec.spans) {
        const { color, ink, wire } = this.spec.kinds[kind];
        context.fillStyle = color;
        const [x, y, width] = this.box(u, context, rank, start, stop, wire ? 0.91 : 0.1, wire ? 0.98 : 0.9);
        if (wire || width < context.measureText(label).width + 4 * ratio) continue;
        context.fillStyle = ink;
        context.fillText(label, x, y);
      }
    }

    tell(u) {
      const [x, y] = [u.posToVal(u.cursor.left, "x"), u.posToVal(u.cursor.top, "y")];
      const at = this.spec.spans.find(([rank, start, stop]) => rank === Math.floor(y) && start <= x && x <= stop);
      if (!at) return `rank ${Math.floor(y)} waits`;
      const [rank, start, stop, kind, label] = at;
      const name = `${this.spec.kinds[kind].words} of microbatch ${label}`;
      return `rank ${rank}: ${name}, ${exact(stop - start)} ms, from ${exact(start)} to ${exact(stop)} ms`;
    }

    walk(u, by) {
      const { spans } = this.spec;
      this.row = Math.max(0, Math.min(spans.length - 1, (this.row ?? (by > 0 ? -1 : spans.length)) + by));
      const [rank, start, stop] = spans[this.row];
      u.setCursor({ left: u.valToPos((start + stop) / 2, "x"), top: u.valToPos(rank + 0.5, "y") });
    }
  }

  const KINDS = { lines: Lines, timeline: Timeline };

  class Chart {
    constructor(figure) {
      this.spec = JSON.parse(figure.querySelector("script").textContent);
      this.title = figure.querySelector("figcaption").textContent;
      this.log = { x: this.spec.log.includes("x"), y: this.spec.log.includes("y") };
      this.quantity = 0;
      this.hidden = new Set();
      this.plot = figure.querySelector(".plot");
      this.readout = el("p", { class: "readout" });
      this.plot.before(this.tools());
      this.plot.after(this.readout, this.legend());
      for (const [name, value] of Object.entries({ tabindex: "0", role: "application",
        "aria-roledescription": "chart", "aria-label":
        `${this.title}. Arrow keys tell values, plus and minus zoom, 0 shows all; a table of values follows.` }))
        this.plot.setAttribute(name, value);
      this.plot.addEventListener("keydown", (event) => this.key(event));
      this.plot.addEventListener("focus", () => this.readout.setAttribute("aria-live", "polite"));
      this.plot.addEventListener("blur", () => this.readout.removeAttribute("aria-live"));
      this.draw();
      new ResizeObserver(() => this.resize()).observe(this.plot);
    }

    button(text, title, press, pressed) {
      const made = el("button", { type: "button", title, "aria-label": title }, text);
      if (pressed !== undefined) made.setAttribute("aria-pressed", pressed);
      made.addEventListener("click", () => press(made));
      return made;
    }

    tools() {
      const made = el("div", { class: "tools", role: "group", "aria-label": `View of ${this.title}` });
      if (this.spec.x.length > 1) {
        const choice = el("select", { "aria-label": "x axis" }, ...this.spec.x.map((name, index) =>
          el("option", { value: index }, `by ${name}`)));
        choice.addEventListener("change", () => this.draw({ quantity: Number(choice.value) }));
        made.append(choice);
      }
      if (this.spec.kind === "lines")
        for (const axis of ["x", "y"])
          made.append(this.button(`log ${axis}`, `Logarithmic ${axis} axis`, (button) => {
            this.log[axis] = !this.log[axis];
            button.setAttribute("aria-pressed", this.log[axis]);
            this.draw();
          }, this.log[axis]));
      made.append(this.button("+", "Zoom in", () => this.zoom(0.5)), this.button("−", "Zoom out", () => this.zoom(2)),
        this.button("all", "Show all", () => this.reset()));
      return made;
    }

    legend() {
      const made = el("ul", { class: "legend" });
      this.swatches = [];
      const entry = (color, content, dash) => {
        const swatch = el("span", { class: "swatch" });
        this.swatches.push([swatch, color, dash]);
        const item = el("li", {}, content ?? "");
        (content ?? item).prepend(swatch);
        made.append(item);
        return item;
      };
      (this.spec.lines ?? []).forEach((line, number) => {
        if (!line.label) return;
        entry(line.color, this.button(line.label, `Show ${line.label}`, (button) => {
          if (!this.hidden.delete(number)) this.hidden.add(number);
          button.setAttribute("aria-pressed", !this.hidden.has(number));
          this.u.setSeries(number + 1, { show: !this.hidden.has(number) });
        }, true), line.line);
      });
      const further = [...(this.spec.bands ?? []), ...(this.spec.marks ?? []), ...Object.values(this.spec.kinds ?? {})];
      for (const each of further) if (each.label) entry(each.color).append(each.label);
      return made;
    }

    draw(change = {}) {
      Object.assign(this, change);
      this.u?.destroy();
      for (const [swatch, color, dash] of this.swatches) {
        swatch.style.borderColor = colour(color);
        swatch.style.borderStyle = dash === "-" || !DASHES[dash] ? "solid" : dash === ":" ? "dotted" : "dashed";
        swatch.className = dash ? "swatch line" : "swatch";
      }
      const kind = (this.kind = new KINDS[this.spec.kind](this));
      const [ink, line] = [colour("ink"), colour("line")];
      const within = (method) => (u) => {
        u.ctx.save();
        u.ctx.beginPath();
        const edge = 5 * devicePixelRatio; // for dots on the frame
        u.ctx.rect(u.bbox.left - edge, u.bbox.top - edge, u.bbox.width + 2 * edge, u.bbox.height + 2 * edge);
        u.ctx.clip();
        kind[method](u, u.ctx);
        u.ctx.restore();
      };
      const axis = { stroke: ink, font: FONT, grid: { stroke: line, width: 1 },
        ticks: { stroke: line, width: 1, size: 5 },
        values: (u, splits) => splits.map((value) => (value === null ? "" : short(value))) };
      const label = { label: this.spec.x[this.quantity], labelFont: FONT, labelSize: 18, labelGap: 0 };
      // as wide as its longest label
      const wide = (u, values) => {
        u.ctx.save();
        u.ctx.font = FONT;
        const widest = Math.max(0, ...(values || []).map((value) => u.ctx.measureText(value).width));
        u.ctx.restore();
        return Math.max(54, Math.ceil(widest) + 14);
      };
      this.u = new uPlot({
        ...this.size(),
        padding: [8, 14, 0, 0],
        legend: { show: false },
        cursor: { drag: { x: true, y: true, uni: 24 }, dataIdx: kind.dataIdx, focus: { prox: -1 } },
        scales: kind.scales,
        axes: [{ ...axis, ...label, size: 32, space: 56, ...kind.axes[0] }, { ...axis, size: wide, ...kind.axes[1] }],
        series: [{}, ...kind.series],
        hooks: { drawAxes: [within("under")], draw: [within("over")], setCursor: [(u) => this.tell(u)] },
      }, kind.data, this.plot);
    }

    tell(u) {
      if (u.cursor.left >= 0) this.readout.textContent = this.kind.tell(u);
    }

    size() {
      const width = Math.max(200, this.plot.clientWidth);
      const height = this.spec.height ?? Math.round(Math.max(210, Math.min(330, 0.62 * width)));
      return { width, height };
    }

    resize() {
      const size = this.size();
      if (size.width !== this.u.width || size.height !== this.u.height) this.u.setSize(size);
    }

    reset() {
      this.u.setData(this.u.data, true);
    }

    zoom(factor) {
      const { min, max } = this.u.scales.x;
      const [to, from] = this.log.x ? [Math.log, Math.exp] : [(value) => value, (value) => value];
      const [middle, half] = [(to(min) + to(max)) / 2, (factor * (to(max) - to(min))) / 2];
      this.u.setScale("x", { min: from(middle - half), max: from(middle + half) });
    }

    key(event) {
      const keys = {
        ArrowRight: () => this.kind.walk(this.u, 1), ArrowLeft: () => this.kind.walk(this.u, -1),
        Home: () => this.kind.walk(this.u, -Infinity), End: () => this.kind.walk(this.u, Infinity),
        "+": () => this.zoom(0.5), "-": () => this.zoom(2), 0: () => this.reset(),
      };
      if (!Object.hasOwn(keys, event.key) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      keys[event.key]();
    }
  }

  function redraw() {
    for (const chart of charts) chart.draw();
  }

  function choose(scheme) {
    if (scheme) root.dataset.scheme = scheme;
    else delete root.dataset.scheme;
    redraw();
  }

  const KEY = "trimaran-report-scheme";
  const button = document.getElementById("scheme");
  try {
    choose(localStorage.getItem(KEY));
  } catch {
    // storage may be forbidden to files: the choice lasts as long as the page is open
  }
  button.hidden = false;
  button.addEventListener("click", () => {
    choose(isDark() ? "light" : "dark");
    try {
      localStorage.setItem(KEY, root.dataset.scheme);
    } catch {
      // see above
    }
  });
  darkness.addEventListener("change", redraw);
  let before;
  addEventListener("beforeprint", () => {
    before = root.dataset.scheme;
    choose("light");
  });
  addEventListener("afterprint", () => choose(before));
  for (const figure of document.querySelectorAll("figure.chart")) charts.push(new Chart(figure));
  root.dataset.ready = "";
})();
