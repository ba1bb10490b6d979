// Numbers as people read them. A dash stands for what there is none of.

export const NONE = "\u2013";

export function count(number) {
  if (number === null || number === undefined) return NONE;
  if (number === 0) return "0";
  if (number >= 1e6) return `${(number / 1e6).toFixed(1)}M`;
  if (number >= 1e4) return `${(number / 1e3).toFixed(1)}k`;
  if (number >= 100) return number.toFixed(0);
  if (number >= 10) return number.toFixed(1).replace(/\.0$/, "");
  return number.toPrecision(2).replace(/\.0$/, "");
}

export function milliseconds(number) {
  if (number === null || number === undefined) return NONE;
  if (number >= 1000) return `${(number / 1000).toPrecision(3)} s`;
  if (number >= 1) return `${number.toPrecision(3)} ms`;
  return `${(number * 1000).toPrecision(3)} \u00b5s`;
}

// Of an axis: no more digits than it takes.
export function shortMilliseconds(number) {
  if (number === 0) return "0";
  if (number >= 1000) return `${Number((number / 1000).toPrecision(3))} s`;
  if (number >= 1) return `${Number(number.toPrecision(3))} ms`;
  return `${Number((number * 1000).toPrecision(3))} \u00b5s`;
}

export function bytes(number) {
  if (!number) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(Math.floor(Math.log2(number) / 10), units.length - 1);
  const scaled = number / 1024 ** power;
  return `${scaled >= 100 ? scaled.toFixed(0) : scaled.toPrecision(2)} ${units[power]}`;
}

export function duration(seconds) {
  const days = Math.floor(seconds / 86400);
  const hours = Math.floor((seconds % 86400) / 3600);
  const minutes = Math.floor((seconds % 3600) / 60);
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}

export function percent(share) {
  return `${(share * 100).toFixed(share > 0 && share < 0.0995 ? 1 : 0)} %`;
}
