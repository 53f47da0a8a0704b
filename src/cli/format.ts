import {Option} from 'commander';

export type Row = Readonly<Record<string, unknown>>;
export type OutputFormat = 'table' | 'json';

export function outputOption(): Option {
	return new Option('-o, --output <format>', 'how to show it').choices(['table', 'json']).default('table');
}

/** JSON has no bigint: 64-bit numbers become text when they do not fit a double. */
export function toJson(value: unknown, indent = 2): string {
	return `${JSON.stringify(value, (_, item: unknown) => typeof item === 'bigint' ? (item <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(item) : item.toString()) : item, indent)}\n`;
}

/** Columns in the order of the first row's keys; `emptyText` when there is no row. */
export function toTable(rows: readonly Row[], emptyText: string): string {
	const [first] = rows;
	if (!first) {
		return `${emptyText}\n`;
	}

	const columns = Object.keys(first);
	const cells = [columns.map(column => column.replaceAll(/([A-Z])/g, ' $1').toUpperCase()), ...rows.map(row => columns.map(column => cell(row[column])))];
	const widths = columns.map((_, index) => Math.max(...cells.map(line => line[index]!.length)));
	return cells.map(line => `${line.map((text, index) => text.padEnd(widths[index]!)).join('  ').trimEnd()}\n`).join('');
}

function cell(value: unknown): string {
	if (value === undefined || value === null || value === '') {
		return '-';
	}

	return typeof value === 'object' ? JSON.stringify(value, (_, item: unknown) => typeof item === 'bigint' ? item.toString() : item) : String(value);
}
