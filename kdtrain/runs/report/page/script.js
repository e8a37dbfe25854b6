// Readings under the pointer: the legend of a chart shows the values at the step that the pointer is at.
"use strict";
for (const plot of document.querySelectorAll(".plot[data-curves]")) {
  const [first, last] = JSON.parse(plot.dataset.range);
  const curves = JSON.parse(plot.dataset.curves);
  const outputs = plot.parentElement.querySelectorAll("output");
  const atRest = Array.from(outputs, (output) => output.textContent);
  const line = document.createElement("span");
  line.className = "here";
  const nearest = (points, step) =>
    points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
  const read = (event) => {
    const box = plot.getBoundingClientRect();
    const pointed = first + ((last - first) * (event.clientX - box.left)) / box.width;
    const step = nearest(curves.map((points) => nearest(points, pointed)), pointed)[0];
    outputs.forEach((output, i) => {
      const value = nearest(curves[i], step)[1];
      output.textContent = value === null ? "–" : value.toLocaleString("en", { maximumSignificantDigits: 4 });
    });
    line.style.left = (100 * (step - first)) / (last - first) + "%";
    line.dataset.step = step.toLocaleString("en");
    plot.append(line);
  };
  plot.addEventListener("pointermove", read);
  plot.addEventListener("pointerdown", read);
  plot.addEventListener("pointerleave", () => {
    line.remove();
    outputs.forEach((output, i) => (output.textContent = atRest[i]));
  });
}
