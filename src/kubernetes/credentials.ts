/**
Token and certificate authority, as files that somebody else replaces: a projected volume is a symbolic link that moves to a new directory.
*/
import {readFileSync} from 'node:fs';
import {performance} from 'node:perf_hooks';
import {reasonOf} from '../errors.js';
import {KubernetesCredentialsError} from './errors.js';

export interface CredentialFiles {
	readonly tokenFile?: string | undefined;
	readonly caFile?: string | undefined;
}

export class Credentials {
	#token: string | undefined;
	#ca: string | undefined;
	#readAt = Number.NEGATIVE_INFINITY;

	constructor(readonly files: CredentialFiles, readonly maxAgeMs: number, readonly log: (line: string) => void) {}

	/** @throws KubernetesCredentialsError when a file cannot be read and never could. */
	get(): {readonly token: string | undefined; readonly ca: string | undefined} {
		if (performance.now() - this.#readAt >= this.maxAgeMs) {
			this.reread();
		}

		return {token: this.#token, ca: this.#ca};
	}

	/** @returns whether there is something new. */
	reread(): boolean {
		const {tokenFile, caFile} = this.files;
		const token = tokenFile === undefined ? undefined : this.#read(tokenFile, this.#token)?.trim();
		const ca = caFile === undefined ? undefined : this.#read(caFile, this.#ca);
		const isNew = token !== this.#token || ca !== this.#ca;
		this.#token = token;
		this.#ca = ca;
		this.#readAt = performance.now();
		return isNew;
	}

	#read(file: string, earlier: string | undefined): string {
		let problem: string;
		let cause: unknown;
		try {
			const text = readFileSync(file, 'utf8');
			if (text.trim()) {
				return text;
			}

			problem = 'it is empty';
		} catch (error) {
			problem = reasonOf(error);
			cause = error;
		}

		const error = new KubernetesCredentialsError(file, problem, {cause});
		if (earlier === undefined) {
			throw error;
		}

		this.log(`${error.message}; going on with what it held before`);
		return earlier;
	}
}
