"use strict";
(() => {
  const points = JSON.parse(document.getElementById("points").textContent);
  const canvas = document.getElementById("map");
  const card = document.getElementById("card");
  const picture = card.querySelector("img");
  const [nameLine, aboutLine] = card.querySelectorAll("bdi, span");
  const context = canvas.getContext("2d");
  let zoom = 1, offsetX = 0, offsetY = 0, chosen = -1, shown = -1;

  const color = (group) => group < 0 ? "#8a929c" : `hsl(${(group * 137.508 + 200) % 360} 65% 48%)`;
  for (const mark of document.querySelectorAll("[data-group]")) {
    mark.querySelector("i").style.background = color(Number(mark.dataset.group));
    mark.addEventListener("click", () => {
      const group = Number(mark.dataset.group);
      chosen = chosen === group ? -1 : group;
      for (const other of document.querySelectorAll("[data-group]"))
        other.setAttribute("aria-pressed", String(Number(other.dataset.group) === chosen));
      draw();
    });
  }

  const side = () => Math.min(canvas.clientWidth, canvas.clientHeight) * 0.92;
  const place = (point) => [
    canvas.clientWidth / 2 + offsetX + point.x * side() * zoom,
    canvas.clientHeight / 2 + offsetY + point.y * side() * zoom,
  ];

  function draw() {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const radius = Math.max(2.5, Math.min(6, 140 / Math.sqrt(points.length))) * Math.min(2, Math.sqrt(zoom));
    points.forEach((point, index) => {
      const [x, y] = place(point);
      context.globalAlpha = chosen >= 0 && point.group !== chosen ? 0.12 : 0.85;
      context.fillStyle = color(point.group);
      context.beginPath();
      context.arc(x, y, index === shown ? radius + 3 : radius, 0, 2 * Math.PI);
      context.fill();
    });
    context.globalAlpha = 1;
  }

  function nearest(x, y, reach) {
    let best = -1, least = reach * reach;
    points.forEach((point, index) => {
      if (chosen >= 0 && point.group !== chosen) return;
      const [px, py] = place(point);
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) { least = distance; best = index; }
    });
    return best;
  }

  function show(index) {
    if (index === shown) return;
    shown = index;
    card.hidden = index < 0;
    if (index >= 0) {
      const point = points[index];
      picture.hidden = !point.jpeg;
      if (point.jpeg) picture.src = "data:image/jpeg;base64," + point.jpeg;
      picture.alt = point.name;
      nameLine.textContent = point.name;
      aboutLine.textContent = point.jpeg ? point.about : "file is gone or unreadable";
      const [x, y] = place(point);
      const width = card.offsetWidth, height = card.offsetHeight;
      card.style.left = Math.max(4, Math.min(x + 14, canvas.clientWidth - width - 4)) + "px";
      card.style.top = Math.max(4, Math.min(y - height / 2, canvas.clientHeight - height - 4)) + "px";
    }
    draw();
  }

  const within = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  function zoomAt(x, y, factor) {
    const next = Math.max(0.8, Math.min(60, zoom * factor));
    const fx = x - canvas.clientWidth / 2 - offsetX, fy = y - canvas.clientHeight / 2 - offsetY;
    offsetX += fx - fx * next / zoom;
    offsetY += fy - fy * next / zoom;
    zoom = next;
    show(-1);
    draw();
  }

  const held = new Map();
  let moved = 0;
  canvas.addEventListener("pointerdown", (event) => {
    held.set(event.pointerId, within(event));
    canvas.setPointerCapture(event.pointerId);
    moved = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = within(event);
    const before = held.get(event.pointerId);
    if (!before) { show(nearest(x, y, 16)); return; }
    if (held.size === 1) {
      offsetX += x - before[0];
      offsetY += y - before[1];
      moved += Math.abs(x - before[0]) + Math.abs(y - before[1]);
      if (moved > 6) { show(-1); draw(); }
    } else {
      const other = [...held].find(([id]) => id !== event.pointerId)[1];
      const old = Math.hypot(before[0] - other[0], before[1] - other[1]);
      const now = Math.hypot(x - other[0], y - other[1]);
      if (old > 0) zoomAt((x + other[0]) / 2, (y + other[1]) / 2, now / old);
      moved = 99;
    }
    held.set(event.pointerId, [x, y]);
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => {
    if (held.delete(event.pointerId) && moved <= 6) show(nearest(...within(event), 24));
  });
  canvas.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") show(-1); });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoomAt(...within(event), Math.exp(-event.deltaY * 0.0015));
  }, { passive: false });
  document.getElementById("closer").addEventListener("click", () => zoomAt(canvas.clientWidth / 2, canvas.clientHeight / 2, 1.5));
  document.getElementById("farther").addEventListener("click", () => zoomAt(canvas.clientWidth / 2, canvas.clientHeight / 2, 1 / 1.5));
  document.getElementById("all").addEventListener("click", () => { zoom = 1; offsetX = offsetY = 0; show(-1); draw(); });
  new ResizeObserver(draw).observe(canvas);
  draw();
})();
