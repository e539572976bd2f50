/** The picture that is asked about: taken in from wherever it comes, and shown with the slices that it is cut into. */

import { tell } from "./texts.js";

const [frame, image, unshowable, cells, hint, caption] =
  ["frame", "shown", "unshowable", "cells", "drop-hint", "cut"].map((id) => document.getElementById(id));
let address = null;

/** Call `take(file)` for a picture that is chosen, dropped or pasted, and `refuse` for several at once. */
export function takeIn(take, refuse) {
  const input = document.getElementById("file");
  document.getElementById("choose").addEventListener("click", () => input.click());
  for (const from of [input, document.getElementById("capture")]) {
    from.addEventListener("change", () => {
      if (from.files.length) take(from.files[0]);
      from.value = ""; // so that the same file may be chosen again
    });
  }
  const given = (event) => {
    const files = [...((event.clipboardData ?? event.dataTransfer)?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    if (files.length > 1) refuse();
    else take(files[0]);
  };
  document.addEventListener("paste", given);
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    given(event);
  });
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
}

/** Show a file, as far as the browser can. */
export function show(file) {
  if (address) URL.revokeObjectURL(address);
  address = URL.createObjectURL(file);
  image.hidden = false;
  unshowable.hidden = true;
  image.onerror = () => {
    image.hidden = true;
    unshowable.hidden = false;
  };
  image.src = address;
  image.alt = file.name;
  frame.hidden = false;
  hint.hidden = true;
  drawCut(null);
}

/** Draw the slices over the picture, each with its visual tokens. */
export function drawCut(cut) {
  const [columns, rows] = cut?.grid ?? [1, 1];
  const [overview, ...slices] = cut?.slice_tokens ?? [];
  cells.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
  cells.replaceChildren(...(slices.length ? slices : cut ? [overview] : []).map(cell));
  if (!cut) return tell(caption, "");
  const tokens = cut.slice_tokens.reduce((sum, one) => sum + one, 0);
  tell(caption, cut.grid ? "cut" : "whole", { overview, columns, rows, tokens });
}

function cell(tokens) {
  const [area, number] = [document.createElement("span"), document.createElement("b")];
  number.textContent = tokens;
  area.append(number);
  return area;
}

/** A file as a data: URL. */
export function encoded(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
