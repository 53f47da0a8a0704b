import {createHash} from 'node:crypto';
import {readFileSync} from 'node:fs';
import {fileURLToPath} from 'node:url';
import {existsSync} from 'node:fs';
import {HostError} from '../errors.js';
import {Schema} from '../maps/schema.js';
import {native, type BpfObject} from '../native.js';

/** The compiled BPF object, opened but not loaded. Close it soon. */
export interface OpenedObject {
	readonly path: string;
	readonly object: BpfObject;
	readonly schema: Schema;
	readonly sha256: string;
}

function objectPath(): string {
	for (const up of ['../../', '../../../']) {
		const path = fileURLToPath(new URL(`${up}build/sidestep.bpf.o`, import.meta.url));
		if (existsSync(path)) {
			return path;
		}
	}

	throw new HostError('the BPF object build/sidestep.bpf.o is not there', 'run `npm run build`');
}

export function openObject(path = objectPath()): OpenedObject {
	const bytes = readFileSync(path);
	const object = native.openObject(bytes, 'sidestep.bpf.o');
	try {
		return {path, object, schema: new Schema(object.btf()), sha256: createHash('sha256').update(bytes).digest('hex')};
	} catch (error) {
		object.close();
		throw error;
	}
}

/** package.json's version. */
export function packageVersion(): string {
	for (const up of ['../../', '../../../']) {
		const path = fileURLToPath(new URL(`${up}package.json`, import.meta.url));
		if (existsSync(path)) {
			return (JSON.parse(readFileSync(path, 'utf8')) as {version: string}).version;
		}
	}

	return 'unknown';
}
